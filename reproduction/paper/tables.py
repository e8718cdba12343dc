"""The tables of the paper and further ones. Each function evaluates its lines and returns a record."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import torch

from reproduction.paper.cells import pick
from reproduction.paper.lines import Line, fused, single, with_seed
from reproduction.paper.records import at_budget
from reproduction.paper.study import Study
from zepad_mm.encoders import optimize_for_inference
from zepad_mm.evaluation import EvalData, Records, Report, evaluate
from zepad_mm.evaluation.subjects import BranchView, FusedAnswer, first_logits
from zepad_mm.models.config import GATED_RULE, Policy
from zepad_mm.models.detection import GATE_SCORE
from zepad_mm.models.zepad import ZePAD
from zepad_mm.selection import select_fusion
from zepad_mm.utils.registry import Registry

# name -> study to record
TABLES: Registry[Any] = Registry("table")
BASELINES = {"pgd_at": "PGD-AT", "trades": "TRADES", "mart": "MART", "gen_af": "Gen-AF, stage 1"}
BASELINES |= {"gen_af_stage_2": "Gen-AF, both stages"}
SCORES = ("confidence_gap", "jensen_shannon", GATE_SCORE)


def paper_lines(study: Study, victim: str) -> dict[str, Line]:
    """The rows of the main table that show the paper's defence, if it is shown for this victim.

    Attacks aim at the encoders and the detector of the last one.
    """
    if not study.has_papers(victim):
        return {}
    members, config = study.defended(victim), study.config
    return {
        "paper's tuning, our rule": fused(config.rule, members, **config.rule_options),
        "paper's": fused("rfdm", members),
    }


def main_lines(study: Study, victim: str) -> dict[str, Line]:
    """The other rows of the main table; the last is ours."""
    lines = {"undefended": single(victim)}
    if study.config.gate is not None:
        lines["ours: tuned victim alone"] = single(study.gated_members(victim)[0])
    return lines | {"ours": study.our_line(victim)}


def every_line(study: Study, victim: str) -> dict[str, Line]:
    """All rows of the main table, in the order of its columns; the last is ours."""
    found = {**main_lines(study, victim), **paper_lines(study, victim)}
    order = ("undefended", "paper's", "paper's tuning, our rule", "ours: tuned victim alone", "ours")
    return {name: found[name] for name in order if name in found}


def rows_of(
    study: Study, title: str, victim: str, lines: dict[str, Line], tasks: list[str] | None = None, **changes: Any
) -> tuple[list[dict[str, Any]], Report]:
    """The rows of a table for a victim on every task, without an attack and under each one; and the report."""
    report = study.evaluate(title, victim, lines, tasks or list(study.tasks), **{"threats": ("T1",), **changes})
    names = {f"{title}-{victim}": list(lines)[-1]}
    names |= {f"{title}-{victim}/{name}": name for name in lines}
    rows = []
    for row in report.rows:
        name = names.get(row["model"])
        if name is None or row["control"] or (row["attack"] == "worst") != (row["threat"] == "T2"):
            continue
        rows.append(
            {
                "victim": victim,
                "task": row["dataset"],
                "model": name,
                "members": list(lines[name].members),
                "threat": row["threat"],
                "condition": row["attack"],
                **{key: row[key] for key in ("epsilon", "accuracy", "ci_low", "ci_high", "n", "asr")},
            }
        )
    order = list(lines)
    return sorted(rows, key=lambda row: order.index(row["model"])), report


def white_box_rows(study: Study, title: str, victim: str, lines: dict[str, Line]) -> list[dict[str, Any]]:
    """Single encoders under a PGD attack on the task that was tuned on."""
    white = study.config.white_box
    changes = {key: getattr(white, key) for key in ("epsilon", "steps", "n")}
    changes |= {"threats": ("T2",), "own_attacks": ("pgd",), "pools": (), "restarts": 1}
    rows, _ = rows_of(study, f"{title}-white-box", victim, lines, [next(iter(study.tasks))], **changes)
    return [{**row, "condition": f"pgd-{white.steps} margin"} for row in rows if row["threat"] == "T2"]


def detection_rows(report: Report, victim: str, title: str, model: str) -> list[dict[str, Any]]:
    """How well the suspicion scores of a default line separate clean from attacked images."""
    keys = ("score", "threat", "auroc", "tpr_at_fpr1", "tpr_at_fpr5", "fpr_at_fpr5", "accuracy_paper_rule", "n")
    return [
        {"victim": victim, "task": row["dataset"], "model": model, "condition": row["attack"]}
        | {key: row[key] for key in keys}
        for row in report.detection
        if row["score"] in SCORES and row["model"] == f"{title}-{victim}"
    ]


@TABLES.register("choice")
def choice(study: Study) -> dict[str, Any]:
    """Our tuning and rule, selected on validation images of the first studied victim.

    Raises ValueError where ours has a gate: its settings are not selected by a table.
    """
    if study.config.gate is not None:
        others = ", ".join(name for name in TABLES if name != "choice")
        raise ValueError(f"tables: choice is for a study without a gate; with one, expected some of {others}")
    config, victim = study.config, study.config.studied[0]
    tunings = [name for name in config.tunings if not name.startswith(("clean", "released", "lambda", "gen_af_"))]
    lines = {"undefended": single(victim)}
    for name in tunings:
        lines[f"{name} alone"] = single(f"{victim}+{name}")
        lines[f"{name} and BMP"] = fused(config.rule, (f"{victim}+{name}", config.our_bmp), **config.rule_options)
    rows, _ = rows_of(study, "choice", victim, lines, split="validation")
    home = next(iter(study.tasks))
    model, images = study.assembled(victim, study.ours(victim), home), study.data(home)[1]
    budget = config.white_box.epsilon
    rule = select_fusion(model, images.sample(config.n_selection, config.seed), epsilon=budget, seed=config.seed)
    return {"rows": rows, "selection": rule.to_dict(), "tuning": _tunings(study, rows)}


@TABLES.register("main")
def main(study: Study) -> dict[str, Any]:
    """BA and RA of every victim on every task under T1 and T1b, and how well the attacks are detected."""
    rows: list[dict[str, Any]] = []
    detection: list[dict[str, Any]] = []
    threats = tuple(study.config.threats)
    for victim in study.config.victims:
        # two evaluations: attacks aim at the encoders and the detector of the default line, which is the last one
        for title, name, lines in (
            ("paper", "paper's", paper_lines(study, victim)),
            ("main", "ours", main_lines(study, victim)),
        ):
            if lines:
                found, report = rows_of(study, title, victim, lines, threats=threats)
                detection += detection_rows(report, victim, title, name)
                rows += found
    order = [(victim, model) for victim in study.config.victims for model in every_line(study, victim)]
    rows.sort(key=lambda row: order.index((row["victim"], row["model"])))
    gates = {} if study.config.gate is None else {victim: study.gate_record(victim) for victim in study.config.victims}
    return {"rows": rows, "detection": detection, "tuning": _tunings(study, rows), "gates": gates}


@TABLES.register("seeds")
def seeds(study: Study) -> dict[str, Any]:
    """Ours again with other seeds of tuning, gate and heads, on the same test images and perturbations."""
    config = study.config
    rows: list[dict[str, Any]] = []
    detection: list[dict[str, Any]] = []
    for victim in config.repeated:
        for seed in (config.seed, *config.seeds):
            name = with_seed(victim, None if seed == config.seed else seed)
            found, report = rows_of(study, "main", name, main_lines(study, name), threats=tuple(config.threats))
            rows += [{**row, "victim": victim, "seed": seed} for row in found]
            scores = pick(detection_rows(report, name, "main", "ours"), score=GATE_SCORE)
            detection += [{**row, "victim": victim, "seed": seed} for row in scores]
    tuning = _tunings(study, rows)
    rows = [{key: value for key, value in row.items() if key != "members"} for row in rows]  # they differ by seed
    return {"rows": rows, "detection": detection, "tuning": tuning}


@TABLES.register("clean")
def clean(study: Study) -> dict[str, Any]:
    """BA on more test images. For each row: the number of images that it has right and the undefended victim wrong
    ("gained"), and the reverse ("lost").
    """
    rows: list[dict[str, Any]] = []
    for victim in study.config.victims:
        lines = every_line(study, victim)
        found, _ = rows_of(study, "clean", victim, lines, threats=(), n=study.config.n_clean)
        for task in study.tasks:
            records = Records.load(study.evaluation_folder("clean", victim, task))
            right = {name: records.predictions[name, "clean/none"] == records.labels for name in lines}
            base = right["undefended"]
            rows += [
                {
                    **row,
                    "gained": int((right[row["model"]] & ~base).sum()),
                    "lost": int((base & ~right[row["model"]]).sum()),
                }
                for row in pick(found, task=task)
            ]
    return {"rows": rows, "tuning": _tunings(study, rows)}


@TABLES.register("ablation")
def ablation(study: Study) -> dict[str, Any]:
    """The contribution of each part, and controls that the paper does not report."""
    rows: list[dict[str, Any]] = []
    for victim in study.config.studied:
        partner, members = study.partner(victim), study.defended(victim)
        lines = {
            "undefended": single(victim),
            "without tuning": fused("rfdm", (victim, partner, "bmp")),
            "without the second MPAE encoder": fused("rfdm", (members[0], "bmp")),
            "without BMP": fused("rfdm", members[:2]),
            "full, as the paper": fused("rfdm", members),
            "full, our rule": fused(study.config.rule, members, **study.config.rule_options),
            **_parts_of_ours(study, victim),
            "control: tuned victim alone": single(members[0]),
            "control: tuned auxiliary encoder alone": single(members[1]),
            "control: BMP alone": single("bmp"),
            "control: victim tuned on clean images": single(f"{victim}+clean"),
            "control: three untuned, equal weights": fused("equal", (victim, partner, "bmp")),
            "control: full, equal weights": fused("equal", members),
        }
        if "gen_af_longer" in study.config.tunings and victim == study.config.studied[0]:
            lines["control: one robust encoder, tuned as long as both"] = single(f"{victim}+gen_af_longer")
        lines["ours"] = lines.pop("ours")  # an evaluation takes the gate of its last line
        rows += rows_of(study, "ablation", victim, lines)[0]
    return {"rows": rows, "tuning": _tunings(study, rows)}


def _parts_of_ours(study: Study, victim: str) -> dict[str, Line]:
    """Ours, other ways to fuse its encoders, and each of them alone."""
    config = study.config
    if config.gate is None:
        return {
            "ours": fused(config.rule, study.ours(victim), **config.rule_options),
            "ours, two objectives": fused(config.rule, study.mixed(victim), **config.rule_options),
            "ours, FARE with labels": fused(config.rule, study.labelled(victim), **config.rule_options),
            "ours: tuned victim alone": single(study.ours(victim)[0]),
            "ours: tuned auxiliary encoder alone": single(study.ours(victim)[1]),
            "ours: BMP alone": single(config.our_bmp),
        }
    members = study.gated_members(victim)
    return {
        "ours": study.our_line(victim),
        "ours, cap 1": fused(GATED_RULE, members, cap=1.0),
        "ours, RFDM instead of the gate": fused("rfdm", members),
        "ours, equal weights instead of the gate": fused("equal", members),
        "ours: tuned victim alone": single(members[0]),
    }


@TABLES.register("baselines")
def baselines(study: Study) -> dict[str, Any]:
    """Other defences of one victim: tuned once with new clean heads, and with the head they were tuned with."""
    victim, home = study.config.studied[0], next(iter(study.tasks))
    known = {name: title for name, title in BASELINES.items() if name in study.config.tunings}
    lines = {title: single(f"{victim}+{name}") for name, title in known.items()}
    own = {f"{title}, its own head": single(f"{victim}+{name}=") for name, title in known.items()}
    references = every_line(study, victim)
    others = [task for task in study.tasks if task != home]
    rows, _ = rows_of(study, "baselines", victim, {**lines, **own, **references}, [home])
    if others:
        rows += rows_of(study, "baselines", victim, {**lines, **references}, others)[0]
    white = white_box_rows(study, "baselines", victim, {**lines, **own})
    return {"rows": rows, "white_box": white, "tuning": _tunings(study, rows)}


@TABLES.register("released")
def released(study: Study) -> dict[str, Any]:
    """Tuning as in the authors' code, and each of its deviations alone, against the corrected one."""
    victim = study.config.studied[0]
    names = [study.config.tuning, *(name for name in study.config.tunings if name.startswith("released"))]
    rows, _ = rows_of(study, "released", victim, {name: single(f"{victim}+{name}") for name in names})
    white = white_box_rows(study, "released", victim, {name: single(f"{victim}+{name}=") for name in names})
    return {"rows": rows, "white_box": white, "tuning": _tunings(study, rows)}


@TABLES.register("fusion")
def fusion(study: Study) -> dict[str, Any]:
    """RFDM's k, the rules, the topology term's weight, and the number of auxiliary encoders (Fig. S2)."""
    rows: list[dict[str, Any]] = []
    config = study.config
    for victim in config.studied:
        members = study.defended(victim)
        extra = [name for name in config.more_adv_au if name not in (victim, study.partner(victim))]
        helpers = [f"{name}+{config.tuning}" for name in (study.partner(victim), *extra)]
        lines = {f"rfdm, k = {k:g}": fused("rfdm", members, k=k) for k in (0.0, 1.0, 2.0, 3.0, 5.0, 10.0)}
        lines |= {name: fused(name, members) for name in ("equal", "entropy", "rfdm_probability", "mixed_nuts")}
        lines |= {f"bounded_benign, {w:g}": fused("bounded_benign", members, benign_weight=w) for w in (0.1, 0.2, 0.3)}
        lines |= {f"capped_rfdm, {cap:g}": fused("capped_rfdm", members, cap=cap) for cap in (0.15, 0.25, 0.35)}
        for count in range(len(helpers) + 1):
            lines[f"rfdm, AdvAU {count}"] = fused("rfdm", (members[0], *helpers[:count], "bmp"))
        if victim == config.studied[0]:
            for name in [name for name in config.tunings if name.startswith("lambda")]:
                lines[name] = single(f"{victim}+{name}")
            if any(name.startswith("lambda") for name in config.tunings):
                lines["lambda as shipped"] = single(members[0])
        rows += rows_of(study, "fusion", victim, lines)[0]
    return {"rows": rows, "tuning": _tunings(study, rows)}


@TABLES.register("white_box")
def white_box(study: Study) -> dict[str, Any]:
    """All threat models on the task that was tuned on."""
    config, home = study.config, next(iter(study.tasks))
    first, selections, reports = config.studied[0], {}, {}
    settings = replace(config.white_box, image_size=config.image_size, seed=config.seed)
    chosen = _gated_models(study) or {
        f"{first}, ours": study.ours(first),
        f"{first}, the paper's tuning": study.defended(first),
        f"{first}, the paper's tuning, rule selected": study.defended(first),
        f"{first}, two objectives": study.mixed(first),
        **{f"{victim}, ours": study.ours(victim) for victim in config.studied},
        **{f"{victim}, ours, rule selected": study.ours(victim) for victim in config.studied},
        **{f"{victim}, FARE with labels, rule selected": study.labelled(victim) for victim in config.studied},
    }

    def build(title: str, members: tuple[str, ...], task: str, data: EvalData) -> ZePAD:
        model = study.assembled(members[0].partition("+")[0], members, task)
        if title.endswith("selected"):  # as ``defend`` does
            images = study.data(task)[1].sample(config.n_selection, config.seed)
            found = select_fusion(model, images, epsilon=settings.epsilon, seed=config.seed)
            selections[title] = found.to_dict()
        return model

    data = study.eval_data(home)
    for title, members in chosen.items():
        policy: Policy | None = "white_box" if title.endswith("white_box") else None
        model = build(title, members, home, data)
        further = config.white_box_epsilons if members[0].partition("+")[0] == first else ()
        for epsilon in dict.fromkeys((settings.epsilon, *further)):
            name = title if epsilon == settings.epsilon else at_budget(title, epsilon)
            out = study.out / "white_box" / re.sub("[ ,/]+", "-", name).replace("'", "")
            options = replace(settings, policy=policy, epsilon=epsilon)
            reports[name] = evaluate(model, data=data, settings=options, out=out, resume=True).to_dict()
    return {"reports": reports, "selections": selections}


def _gated_models(study: Study) -> dict[str, tuple[str, ...]]:
    """The models of the white-box table for ours under a gate; none without one."""
    if study.config.gate is None:
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for victim in study.config.studied:
        found[f"{victim}, ours, white_box"] = found[f"{victim}, ours"] = study.gated_members(victim)
        if study.has_papers(victim):
            found[f"{victim}, the paper's"] = study.defended(victim)
    return found


@TABLES.register("cost")
def cost(study: Study) -> dict[str, Any]:
    """Parameters, size of the weights, seconds of tuning and inference time of each row."""
    victim, home = study.config.studied[0], next(iter(study.tasks))
    images, rows = study.data(home)[2].images[:250], []
    lines = {**every_line(study, victim), "tuned victim alone": single(f"{victim}+{study.config.tuning}")}
    for model, line in lines.items():
        branches = [study.branch(home, name) for name in line.members]
        gate = study.gate(victim) if line.gated else None
        answer = FusedAnswer(line.fusion(gate)) if line.rule else first_logits
        fast = [optimize_for_inference(branch, study.config.image_size) for branch in branches]
        model_of_line = BranchView(fast, answer, gate)
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            with torch.no_grad():
                model_of_line(images.to(study.device))
            taken.append(time.perf_counter() - began)
        count = sum(parameter.numel() for branch in branches for parameter in branch.parameters())
        tuned = [study.tuning_record(name)["seconds"] for name in line.members if "+" in name]
        if gate is not None:
            count += sum(parameter.numel() for parameter in gate.parameters())
            tuned.append(study.gate_record(victim)["seconds"])
        rows.append(
            {
                "model": model,
                "parameters": count,
                "weights_mib": round(4 * count / 2**20, 2),
                "tuning_s": round(sum(tuned), 1),
                "ms_per_image": round(1000 * min(taken) / len(images), 3),
            }
        )
    return {"rows": rows, "victim": victim}


def _tunings(study: Study, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The records of all tunings behind these rows."""
    names = {name.removesuffix("=") for found in rows for name in found["members"] if "+" in name}
    return {name: study.tuning_record(name) for name in sorted(names)}
