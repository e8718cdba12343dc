"""Plots of an evaluation. Each function takes rows and tensors and returns a matplotlib Figure; none shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from zepad_mm.attacks import Perturbation
from zepad_mm.evaluation.data import EvalData
from zepad_mm.evaluation.metrics import wilson
from zepad_mm.evaluation.records import Attempt, Records, pixel_hashes
from zepad_mm.evaluation.report import OVERESTIMATED, Report, budget_of, by_strength
from zepad_mm.evaluation.stage_cache import read_stage
from zepad_mm.evaluation.threats import CLEAN, T1, T2, T3, THREATS
from zepad_mm.models.zepad import ZePAD
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.text import budget_text

# told apart by colour-blind readers (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
RIGHT, WRONG = "#0060a8", "#b34700"  # of an answer, beside a mark that says the same


def reader_name(model: str) -> str:
    """The name of a model of a report in words: "branch:fare" is "fare alone"."""
    kind, _, name = model.partition(":")
    words = {"branch": f"{name} alone", "baseline": f"{name} (baseline)", "zepad": f"defended, {name}"}
    if name:
        return words.get(kind, model)
    return {"zepad": "defended"}.get(kind, model)


def confidence_figure(logits: Mapping[str, Tensor], names: Sequence[str], benign: Sequence[bool]) -> Figure:
    """Plot how confident each branch is, without and under attack (the paper's figure 2).

    Args:
        logits: panel title -> branch logits (N, n, C), e.g. ``{"clean": ..., "T1": ...}``.
        names: of the N branches.
        benign: for each branch whether it is a benign one.
    """
    figure = _figure(3.6 * len(logits), 2.9)
    bins = torch.linspace(0, 1, 26).tolist()
    panels = figure.subplots(1, len(logits), sharey=True, squeeze=False)[0]
    for panel, (title, branch_logits) in zip(panels, logits.items(), strict=True):
        for index, name in enumerate(names):
            confidence = branch_logits[index].softmax(-1).amax(-1)
            label = f"{name} ({'benign' if benign[index] else 'robust'}), mean {float(confidence.mean()):.2f}"
            style = {"histtype": "step", "linewidth": 1.6, "linestyle": "--" if benign[index] else "-"}
            panel.hist(confidence.tolist(), bins=bins, label=label, color=COLOURS[index % len(COLOURS)], **style)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("largest softmax probability")
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    panels[0].set_ylabel("images")
    return figure


def contact_sheet(
    clean: Tensor, attacked: Tensor, truth: Sequence[str], answers: Mapping[str, Sequence[str]], title: str = ""
) -> Figure:
    """Plot clean images, what the attack added (magnified about grey), and attacked images with the answers below.

    Args:
        clean, attacked: (k, 3, H, W) in [0, 1].
        truth: (k,) true class names.
        answers: model -> its (k,) answers on the attacked images, marked as right or wrong.
        title: of the figure.

    Raises:
        ValueError: no image, or lengths that differ.
    """
    count = len(clean)
    if count == 0 or len(attacked) != count or len(truth) != count or any(len(a) != count for a in answers.values()):
        raise ValueError(f"contact_sheet: expected as many attacked images and answers as clean ones, {count}")
    added = attacked - clean
    factor = 0.5 / max(float(added.abs().max()), 1e-8)
    figure = _figure(1.3 * count + 0.4, 4.4 + 0.15 * len(answers))
    grid = figure.subplots(3, count, squeeze=False)
    for line, (images, name) in enumerate(
        ((clean, "clean"), (0.5 + factor * added, f"added, x {factor:.0f}"), (attacked, "attacked"))
    ):
        for column in range(count):
            panel = grid[line][column]
            panel.imshow(images[column].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
        grid[line][0].set_ylabel(name, fontsize=9)
    for column in range(count):
        grid[0][column].set_title(truth[column], fontsize=8)
        for row, given in enumerate(answers.values()):
            right = given[column] == truth[column]
            style = {"ha": "center", "va": "top", "fontsize": 7, "color": RIGHT if right else WRONG}
            place = {"xycoords": "axes fraction", "annotation_clip": False}
            text = f"{'✓' if right else '✗'} {given[column]}"
            grid[2][column].annotate(text, (0.5, -0.08 - 0.15 * row), **style, **place)
    for row, model in enumerate(answers):
        style = {"ha": "right", "va": "top", "fontsize": 7, "xycoords": "axes fraction", "annotation_clip": False}
        grid[2][0].annotate(reader_name(model), (-0.08, -0.08 - 0.15 * row), **style)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(" ", fontsize=4)  # keeps the last line of answers inside the figure
    return figure


def tradeoff_figure(report: Report) -> Figure:
    """Plot the accuracy of each model without an attack and in the worst case of each threat model, with intervals."""
    threats = [threat for threat in report.threats if not THREATS[threat].default_only]
    figure = _figure(max(5.2, 1.2 + 0.95 * len(report.models)), 4.3)  # the legend needs its room
    panel = figure.subplots()
    width = 0.8 / len(threats)
    for index, threat in enumerate(threats):
        rows = [report.row(model, threat) for model in report.models]
        places = [place + (index - (len(threats) - 1) / 2) * width for place in range(len(rows))]
        heights = [100 * row["accuracy"] for row in rows]
        budget = "" if threat == CLEAN.key else f" worst, {budget_of(rows[0])}"
        colour = COLOURS[index % len(COLOURS)]
        panel.bar(places, heights, width, yerr=_error_bars(rows), label=f"{threat}{budget}", color=colour)
    names = [reader_name(model) for model in report.models]
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    panel.set_ylabel("accuracy, %")
    panel.set_ylim(0, 100)
    figure.legend(fontsize=8, loc="outside lower center", ncols=min(len(threats), 3))
    first = report.rows[0]
    doubt = f" ({OVERESTIMATED})" if report.doubted else ""
    panel.set_title(f"{first['dataset']}, {first['n']} images{doubt}", fontsize=10)
    return figure


def frontier_figure(report: Report) -> Figure:
    """Plot each model's accuracy under the strongest threat model that all face against its clean accuracy.

    Better models are further up and to the right; bars are 95 % intervals.
    """
    threat = _strongest_common(report)
    figure = _figure(5.2, 4.2)
    panel = figure.subplots()
    kinds = list(dict.fromkeys(report.kinds.values()))
    for name, kind in report.kinds.items():
        clean, held = report.row(name), report.row(name, threat)
        across, along = _error_bars([clean]), _error_bars([held])
        place, colour = (100 * clean["accuracy"], 100 * held["accuracy"]), COLOURS[kinds.index(kind) % len(COLOURS)]
        panel.errorbar(*place, xerr=across, yerr=along, fmt="o", color=colour, elinewidth=0.8)
        panel.annotate(reader_name(name), place, xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
    panel.set_xlabel("accuracy without an attack, %")
    panel.set_ylabel(f"accuracy under {threat}, %")
    panel.set_ylim(bottom=0)
    row = report.row(report.default, threat)
    doubt = f" ({OVERESTIMATED})" if report.doubted else ""
    panel.set_title(f"{row['dataset']}, {threat} worst at {budget_of(row)}, {row['n']} images{doubt}", fontsize=10)
    return figure


def _error_bars(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """What matplotlib draws as the 95 % intervals of rows in %: lengths below and above."""
    below = [100 * (row["accuracy"] - row["ci_low"]) for row in rows]
    return [below, [100 * (row["ci_high"] - row["accuracy"]) for row in rows]]


def _strongest_common(report: Report) -> str:
    """The strongest threat model that every model has a row for."""
    for threat in reversed(by_strength(report)):
        if not THREATS[threat].default_only:
            return threat
    return CLEAN.key


def roc_figure(clean: Tensor, attacked: Mapping[str, Tensor], score: str) -> Figure:
    """Plot the share of attacked images that a suspicion score catches against its false alarms on clean images.

    Args:
        clean: (n,) scores of images without an attack.
        attacked: name of an attack -> (k,) scores of the images that it changed.
        score: name of the score.

    Raises:
        ValueError: no scores.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    if not len(clean) or not attacked or not all(map(len, attacked.values())):
        raise ValueError("roc_figure: expected scores of clean images and of at least one attack, got none")
    figure = _figure(4.6, 4.2)
    panel = figure.subplots()
    for index, (name, scores) in enumerate(attacked.items()):
        truth = [0] * len(clean) + [1] * len(scores)
        values = torch.cat([clean, scores]).tolist()
        alarms, caught, _ = roc_curve(truth, values)
        label = f"{name}, AUROC {roc_auc_score(truth, values):.3f}, n {len(scores)}"
        panel.plot(100 * alarms, 100 * caught, label=label, color=COLOURS[index % len(COLOURS)])
    panel.plot([0, 100], [0, 100], color="#bbbbbb", linestyle=":", linewidth=1)
    panel.set_xlabel("false alarms on clean images, %")
    panel.set_ylabel("attacked images caught, %")
    panel.legend(fontsize=7, loc="lower right")
    panel.set_title(f"detection by {score}, {len(clean)} clean images", fontsize=10)
    return figure


def budget_figure(report: Report) -> Figure:
    """Plot the accuracy of the model as it ships against the budget of a white-box attack, with 95 % intervals.

    From the ``budget_sweep`` check, which takes a sample of the images; at 0 all of them.

    Raises:
        ValueError: the report holds no such check; it needs T2 and ``diagnostics_n`` above 0.
    """
    held = budget_sweep(report)
    if not held:
        raise ValueError("budget_figure: the report has no budget_sweep; run T2 with diagnostics_n of at least 1")
    clean = report.row(report.default)
    n = min(report.meta["config"]["evaluation"]["diagnostics_n"], clean["n"])
    points = [(0.0, clean["accuracy"], clean["ci_low"], clean["ci_high"])]
    points += [(budget, share, *wilson(round(share * n), n)) for budget, share in sorted(held.items())]
    figure = _figure(4.6, 3.4)
    panel = figure.subplots()
    below, above = [100 * (p[1] - p[2]) for p in points], [100 * (p[3] - p[1]) for p in points]
    heights, places = [100 * p[1] for p in points], [p[0] for p in points]
    panel.errorbar(places, heights, yerr=[below, above], marker="o", color=COLOURS[0], capsize=3)
    panel.set_xticks(places, [f"{place:g}" for place in places], fontsize=8)
    norm = report.row(report.default, T2.key)["norm"]
    panel.set_xlabel("budget, / 255 (L-inf)" if norm == "linf" else "budget (L2)")
    panel.set_ylabel("accuracy, %")
    panel.set_ylim(0, 100)
    panel.set_title(f"{clean['dataset']}, white box, {n} images (at 0: {clean['n']})", fontsize=10)
    return figure


def budget_sweep(report: Report) -> dict[float, float]:
    """Return budget (1/255, or L2) -> accuracy in [0, 1] of the model as it ships; empty without that check."""
    for check in report.meta.get("diagnostics", []):
        if check["name"] == "budget_sweep":
            shares = {key.removesuffix("/255").removeprefix("L2 "): share for key, share in check["values"].items()}
            return {float(budget): share for budget, share in shares.items()}
    return {}


def write_figures(report: Report, out: str | Path, model: ZePAD | None, data: EvalData, count: int = 8) -> list[Path]:
    """Draw what the folder of a finished evaluation allows, as PNG files in ``out``.

    Args:
        report: what ``evaluate`` returned.
        out: the folder it wrote to.
        model: the defended model; None for any other, which gets no plot of branches.
        data: what ``evaluate`` was given.
        count: images on the contact sheet: the first that the undefended model (or the only one) gets right without
            an attack, so that none were chosen to favour the defence.
    """
    out = Path(out)
    records = Records.load(out)
    figures = {"accuracy": tradeoff_figure(report)}
    if model is not None:
        figures["confidence"] = _confidence_of_branches(records, out, model)
        figures |= _detection_roc(report, records, out, model)
    if len(report.models) > 1 and report.threats != [CLEAN.key]:
        figures["frontier"] = frontier_figure(report)
    if budget_sweep(report):
        figures["budget"] = budget_figure(report)
    sheet = _sheet(report, records, out, data, count)
    if sheet is not None:
        figures["contact_sheet"] = sheet
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        save(figure, paths[-1])
    return paths


def _universal_attempts(records: Records) -> list[Attempt]:
    return [attempt for attempt in records.attempts if attempt.threat == T1.key and not attempt.control]


def _confidence_of_branches(records: Records, out: Path, model: ZePAD) -> Figure:
    """Confidences without an attack and under each universal perturbation."""
    names, logits = list(model.branches), {}
    for attempt in (records.attempts[0], *_universal_attempts(records)):
        title = CLEAN.key if attempt.threat == CLEAN.key else f"{attempt.threat} {attempt.algorithm}"
        logits[title] = read_stage(out, attempt.threat, attempt.attack)["logits"][: len(names)]
    return confidence_figure(logits, names, model.benign)


def _detection_roc(report: Report, records: Records, out: Path, model: ZePAD) -> dict[str, Figure]:
    """The figure "roc": universal perturbations on all images, white-box attacks where they made the answer wrong.

    Of the white-box attacks each image shows its least suspicious success.
    """
    members = [*range(len(model.branches)), *([-1] if model.gate is not None else [])]

    def scores(attempt: Attempt) -> Tensor:
        return model.fuse(read_stage(out, attempt.threat, attempt.attack)["logits"][members]).score

    with torch.no_grad():
        clean, attacked = scores(records.attempts[0]), dict[str, Tensor]()
        for attempt in _universal_attempts(records):
            attacked[f"{attempt.threat} {attempt.algorithm}"] = scores(attempt)
        for threat in (T2.key, T3.key):
            least = torch.full_like(clean, float("inf"))
            for attempt in records.attempts:
                if attempt.threat == threat and not attempt.control:
                    wrong = records.predictions[report.default, attempt.key] != records.labels
                    right = records.predictions[report.default, records.attempts[0].key] == records.labels
                    tried = torch.arange(len(clean)) < (attempt.n or len(clean))
                    least = torch.where(wrong & right & tried, torch.minimum(least, scores(attempt)), least)
            if bool(least.isfinite().any()):
                attacked[f"{threat} successes"] = least[least.isfinite()]
    return {"roc": roc_figure(clean, attacked, model.config.detector.score)} if attacked else {}


def _sheet(report: Report, records: Records, out: Path, data: EvalData, count: int) -> Figure | None:
    """The first universal perturbation on the first images; None where there is none."""
    undefended, universal = report.undefended or report.default, _universal_attempts(records)
    right = (records.predictions[undefended, records.attempts[0].key] == records.labels).nonzero()[:count, 0]
    if not universal or not len(right):
        return None
    attempt, names = universal[0], data.test.class_names
    place = {pixels: index for index, pixels in enumerate(pixel_hashes(data.test.images))}
    clean = data.test.images[[place[records.images[index]] for index in right.tolist()]]  # records may be shuffled
    attacked = Perturbation(read_stage(out, attempt.threat, attempt.attack)["delta"], attempt.epsilon)(clean)
    answers = {
        model: [names[index] for index in records.predictions[model, attempt.key][right].tolist()]
        for model in dict.fromkeys((undefended, report.default))
    }
    truth = [names[index] for index in records.labels[right].tolist()]
    title = f"{attempt.threat}, {attempt.algorithm}, {budget_text(attempt.epsilon, attempt.norm)}"
    return contact_sheet(clean, attacked, truth, answers, title)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140, bbox_inches="tight")  # legends may lie outside


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
