"""The tables of the paper and those it lacks. Each function fills what it needs of the study and returns a record."""

from __future__ import annotations

import time
from typing import Any

import torch

from reproduction.paper.lines import detection_rows, fused, main_lines, rows_of, single
from reproduction.paper.study import Line, Study
from zepad_mm.attacks import PGD
from zepad_mm.data import LabelledImages
from zepad_mm.encoders import optimize_for_inference
from zepad_mm.evaluation import EvalData, EvalSettings, evaluate
from zepad_mm.evaluation.metrics import share
from zepad_mm.models.branch import Branch
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.selection import select_fusion
from zepad_mm.utils.registry import Registry

# name -> study to record
TABLES: Registry[Any] = Registry("table")
BASELINES = {"pgd_at": "PGD-AT", "trades": "TRADES", "mart": "MART", "gen_af": "Gen-AF, stage 1"}
BASELINES |= {"gen_af_stage_2": "Gen-AF, both stages"}


@TABLES.register("choice")
def choice(study: Study) -> dict[str, Any]:
    """What ours is made of, decided on validation pictures of the first studied victim: the tuning, then the rule."""
    config, victim, rows = study.config, study.config.studied[0], []
    tunings = [name for name in config.tunings if not name.startswith(("clean", "released", "lambda", "gen_af_"))]
    lines = {"undefended": single(victim)}
    for name in tunings:
        lines[f"{name} alone"] = single(f"{victim}+{name}")
        lines[f"{name} and BMP"] = fused(config.rule, (f"{victim}+{name}", config.our_bmp), **config.rule_options)
    for task in study.tasks:
        rows += rows_of(study, victim, task, lines, split="validation")
    home = next(iter(study.tasks))
    model, pictures = assembled(study, victim, study.ours(victim), home), study.pictures(home, "validation")
    budget = EvalSettings.from_dict(config.evaluation).epsilon
    rule = select_fusion(model, pictures.sample(config.n_selection, config.seed), epsilon=budget, seed=config.seed)
    return {"rows": rows, "selection": rule.to_dict(), "tuning": _tunings(study, rows)}


@TABLES.register("main")
def main(study: Study) -> dict[str, Any]:
    """BA and RA of every victim on every task, T1 and T1b, and how well the attacks are detected."""
    rows, detection = [], []
    for victim in study.config.victims:
        for task in study.tasks:
            rows += rows_of(study, victim, task, main_lines(study, victim), family=True)
            detection += detection_rows(study, victim, task, study.defended(victim), "paper's")
            detection += detection_rows(study, victim, task, study.ours(victim), "ours")
            print(f"main: {victim} on {task} done", flush=True)
    return {"rows": rows, "detection": detection, "tuning": _tunings(study, rows)}


@TABLES.register("ablation")
def ablation(study: Study) -> dict[str, Any]:
    """What each part is worth, and the controls that the paper lacks."""
    rows = []
    for victim in study.config.studied:
        partner, members = study.partner(victim), study.defended(victim)
        lines = {
            "undefended": single(victim),
            "without tuning": fused("rfdm", (victim, partner, "bmp")),
            "without the second MPAE encoder": fused("rfdm", (members[0], "bmp")),
            "without BMP": fused("rfdm", members[:2]),
            "full, as the paper": fused("rfdm", members),
            "full, our rule": fused(study.config.rule, members, **study.config.rule_options),
            "ours": fused(study.config.rule, study.ours(victim), **study.config.rule_options),
            "ours, two objectives": fused(study.config.rule, study.mixed(victim), **study.config.rule_options),
            "ours, FARE with labels": fused(study.config.rule, study.labelled(victim), **study.config.rule_options),
            "ours: tuned victim alone": single(study.ours(victim)[0]),
            "ours: tuned auxiliary encoder alone": single(study.ours(victim)[1]),
            "ours: BMP alone": single(study.config.our_bmp),
            "control: tuned victim alone": single(members[0]),
            "control: tuned auxiliary encoder alone": single(members[1]),
            "control: BMP alone": single("bmp"),
            "control: victim tuned on clean pictures": single(f"{victim}+clean"),
            "control: three untuned, equal weights": fused("equal", (victim, partner, "bmp")),
            "control: full, equal weights": fused("equal", members),
        }
        if "gen_af_longer" in study.config.tunings and victim == study.config.studied[0]:
            lines["control: one robust encoder, tuned as long as both"] = single(f"{victim}+gen_af_longer")
        for task in study.tasks:
            rows += rows_of(study, victim, task, lines)
    return {"rows": rows, "tuning": _tunings(study, rows)}


@TABLES.register("baselines")
def baselines(study: Study) -> dict[str, Any]:
    """Other defences of one victim: tuned once with new clean heads, and with the head they were tuned with."""
    victim, rows, home = study.config.studied[0], [], next(iter(study.tasks))
    lines = {title: single(f"{victim}+{name}") for name, title in BASELINES.items() if name in study.config.tunings}
    own = {f"{t}, its own head": single(f"{victim}+{n}=") for n, t in BASELINES.items() if n in study.config.tunings}
    for task in study.tasks:
        there = {**lines, **own} if task == home else lines
        rows += rows_of(study, victim, task, {**there, **main_lines(study, victim)})
    white = [_white_box(study, victim, home, model, line) for model, line in {**lines, **own}.items()]
    return {"rows": rows, "white_box": white, "tuning": _tunings(study, rows)}


@TABLES.register("released")
def released(study: Study) -> dict[str, Any]:
    """Tuning as the authors' code does it, and each of its quirks alone, against the corrected one."""
    victim, rows, white, home = study.config.studied[0], [], [], next(iter(study.tasks))
    names = [study.config.tuning, *(name for name in study.config.tunings if name.startswith("released"))]
    lines = {name: single(f"{victim}+{name}") for name in names}
    for task in study.tasks:
        rows += rows_of(study, victim, task, lines)
    for name in names:
        white.append(_white_box(study, victim, home, name, single(f"{victim}+{name}=")))
    return {"rows": rows, "white_box": white, "tuning": _tunings(study, rows)}


@TABLES.register("fusion")
def fusion(study: Study) -> dict[str, Any]:
    """RFDM's k, the rules, the topology term's weight, and the number of auxiliary encoders (Fig. S2)."""
    rows, config = [], study.config
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
            lines["lambda as shipped"] = single(members[0])
        for task in study.tasks:
            rows += rows_of(study, victim, task, lines)
    return {"rows": rows, "tuning": _tunings(study, rows)}


@TABLES.register("white_box")
def white_box(study: Study) -> dict[str, Any]:
    """T1, T1b, T2 and T3 side by side by ``evaluate``, on the task that was tuned on."""
    config, home, reports = study.config, next(iter(study.tasks)), {}
    _, validation, test = study.data(home)
    settings = EvalSettings.from_dict({**config.evaluation, "image_size": config.image_size, "seed": config.seed})
    data = EvalData(test, validation, study.surrogate())
    first, selections = config.studied[0], {}
    chosen = {
        f"{first}, ours": study.ours(first),
        f"{first}, the paper's tuning": study.defended(first),
        f"{first}, the paper's tuning, rule selected": study.defended(first),
        f"{first}, two objectives": study.mixed(first),
        **{f"{victim}, ours": study.ours(victim) for victim in config.studied},
        **{f"{victim}, ours, rule selected": study.ours(victim) for victim in config.studied},
        **{f"{victim}, FARE with labels, rule selected": study.labelled(victim) for victim in config.studied},
    }
    for title, members in chosen.items():
        out = study.out / "white_box" / title.replace(", ", "-").replace(" ", "-").replace("'", "")
        model = assembled(study, members[0].partition("+")[0], members, home)
        if title.endswith("selected"):  # as ``defend`` does it
            pictures = validation.sample(config.n_selection, config.seed)
            found = select_fusion(model, pictures, epsilon=settings.epsilon, seed=config.seed)
            selections[title] = found.to_dict()
        report = evaluate(model, data=data, settings=settings, out=out, resume=True)
        reports[title] = report.to_dict()
        print(f"white box: {title} done", flush=True)
    return {"reports": reports, "selections": selections}


@TABLES.register("cost")
def cost(study: Study) -> dict[str, Any]:
    """Parameters, seconds of tuning and of answers for each row; the memory that weights take."""
    victim, home = study.config.studied[0], next(iter(study.tasks))
    pictures, rows = study.data(home)[2].images[:250], []
    lines = {**main_lines(study, victim), "tuned victim alone": single(f"{victim}+{study.config.tuning}")}
    for model, line in lines.items():
        parts = [study.branch(home, name) for name in line.members]
        fast = [optimize_for_inference(part, study.config.image_size) for part in parts]
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            with torch.no_grad():
                line.fuse(torch.stack([part(pictures.to(study.device)) for part in fast]))
            taken.append(time.perf_counter() - began)
        count = sum(parameter.numel() for part in parts for parameter in part.parameters())
        tuned = [study.tuning_record(name)["seconds"] for name in line.members if "+" in name]
        rows.append(
            {
                "model": model,
                "parameters": count,
                "weights_mib": round(4 * count / 2**20, 2),
                "tuning_s": round(sum(tuned), 1),
                "ms_per_image": round(1000 * min(taken) / len(pictures), 3),
            }
        )
    return {"rows": rows, "victim": victim}


def assembled(study: Study, victim: str, members: tuple[str, ...], task: str) -> ZePAD:
    """The defence of a victim for a task as a model, with the undefended victim beside it."""
    parts: list[Branch] = [study.branch(task, name) for name in members]
    test: LabelledImages = study.data(task)[2]
    about = ZePADConfig(
        public_source=study.source(victim),
        branches=tuple(part.config for part in parts),
        class_names=test.class_names,
        fusion=study.config.rule,
        fusion_params=study.config.rule_options,
    )
    return ZePAD(about, parts).set_undefended(study.branch(task, victim))


def _white_box(study: Study, victim: str, task: str, model: str, line: Line) -> dict[str, Any]:
    """One encoder under PGD-20 on the margin: does robustness to one perturbation for all mean robustness?"""
    config, (name,) = study.config, line.members
    test = study.data(task)[2].sample(config.n_white_box, config.seed)
    branch = optimize_for_inference(study.branch(task, name), config.image_size)
    attack = PGD(epsilon=config.epsilon, steps=config.pgd_steps, loss="margin")
    right = []
    for images, labels in test.batches(100):
        attacked = attack(branch, images, labels, generator=torch.Generator().manual_seed(config.seed))
        with torch.no_grad():
            right.append(branch(attacked).argmax(-1) == labels)
    found = share(torch.cat(right))
    return {
        "victim": victim,
        "task": task,
        "model": model,
        "threat": "T2",
        "condition": f"pgd-{attack.steps} margin",
        "epsilon": attack.epsilon,
        "accuracy": found.value,
        "ci_low": found.interval[0],
        "ci_high": found.interval[1],
        "n": found.n,
    }


def _tunings(study: Study, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The records of all tunings behind these rows."""
    names = {name.removesuffix("=") for found in rows for name in found["members"] if "+" in name}
    return {name: study.tuning_record(name) for name in sorted(names)}
