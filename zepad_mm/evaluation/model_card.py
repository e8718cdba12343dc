"""The model card of a defended model, written from the report of its evaluation.

No number in it is typed by hand: numbers and warnings are those of the report, which has to be of this very model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from zepad_mm.encoders.sources import is_local
from zepad_mm.evaluation.report import OVERESTIMATED, Report, budget_of, cell
from zepad_mm.evaluation.report_text import OPERATING_POINTS, operating_points, plain_words
from zepad_mm.evaluation.threats import CLEAN, T1I, T1IB, T2, T3, THREATS, WORST, RowKind
from zepad_mm.models.card import GENERATED, PLACEHOLDER, card_metadata, describe_model, short_card
from zepad_mm.models.config import CONFIG, GATED_RULE, ZePADConfig
from zepad_mm.utils.hub import RESULTS_FILE, card_text
from zepad_mm.utils.io import read_json, write_text
from zepad_mm.utils.text import bullets, markdown_table, percent

# what determines the answers of a model, beside its weights
IDENTITY = ("public_source", "branches", "fusion", "fusion_params", "detector")


def model_card(config: ZePADConfig, report: Report | None) -> str:
    """Return the text of ``README.md``: metadata that the Hub reads, and Markdown.

    Args:
        config: of the model.
        report: an evaluation of that model; None gives a card that says so.

    Raises:
        ValueError: the report is of another model, or of none that is defended.
    """
    if report is None:
        return short_card(config)
    _check_same_model(config, report)
    parts = [
        f"{GENERATED}\n# ZePAD over `{config.public_source}`",
        *_doubts(report),
        f"{_opening(config)} {_headline(report)}",
        _usage(config),
        f"## What holds\n\n{plain_words(report)[0]}",
        *plain_words(report)[1:],
        "## Limitations\n\n" + bullets(_limitations(config, report)),
        _robustness(report),
        *_detection(config, report),
        f"## What it is made of\n\n{describe_model(config)}",
        _origin(report),
    ]
    data = {**card_metadata(config), "model_name": f"ZePAD over {config.public_source}", "metrics": ["accuracy"]}
    return card_text("\n\n".join(parts), **data, eval_results=list(_results(config, report)))


def write_card(folder: str | Path, report: Report | None) -> None:
    """Write :func:`model_card` into the folder of a saved model; a card that was generated before is replaced.

    Raises:
        FileNotFoundError: no model there; FileExistsError: a card written by hand; ValueError: as above.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG} does not exist; expected a folder by ZePAD.save_pretrained")
    card = folder / "README.md"
    if card.is_file() and GENERATED not in card.read_text(encoding="utf-8"):
        raise FileExistsError(f"{card} was not written by zepad-mm and is kept; move it away for a new one")
    write_text(card, model_card(ZePADConfig.from_dict(read_json(folder / CONFIG)), report))


def eval_result_entries(config: ZePADConfig, report: Report) -> list[EvalResultEntry]:
    """The accuracies in the Hub's newer form, one for each threat model, whose key is the task of the data set.

    Empty where the data set was not read from the Hub: an entry names it by its name there.

    Args:
        config, report: as for :func:`model_card`.

    Raises:
        ValueError: as for :func:`model_card`.
    """
    _check_same_model(config, report)
    data, entries = report.meta["config"].get("hub_data"), []
    for result in _results(config, report) if data else ():
        about: dict[str, Any] = result.metric_args or {}
        notes = f"{result.metric_name}; {about['n']} images of the split {result.dataset_split}; zepad-mm"
        entry = EvalResultEntry(data, about["threat"], result.metric_value, notes=notes)
        entries.append(entry)
    return entries


def eval_result_files(config: ZePADConfig, report: Report) -> dict[str, str]:
    """Name and text of the file of :func:`eval_result_entries` in a repository; empty where there are none."""
    entries = eval_result_entries(config, report)
    return {RESULTS_FILE: yaml_dump(eval_result_entries_to_yaml(entries))} if entries else {}


def _check_same_model(config: ZePADConfig, report: Report) -> None:
    evaluated = report.meta.get("config", {}).get("model")
    if not isinstance(evaluated, dict) or not report.models_of(RowKind.UNDEFENDED):
        raise ValueError("the report does not say which model it is of; expected one by zepad_mm.evaluate")
    # as both stand in files: a report that was just made still holds tuples, an older one lacks newer fields
    full = ZePADConfig.from_dict(evaluated).to_dict()
    evaluated, ours = (json.loads(json.dumps(values)) for values in (full, config.to_dict()))
    other = [key for key in IDENTITY if evaluated.get(key) != ours[key]]
    prints = evaluated.get("fingerprint", []), ours["fingerprint"]
    # of other classes, or not saved yet, the fingerprints cannot be compared
    if all(prints) and evaluated.get("class_names") == ours["class_names"]:
        same = len(prints[0]) == len(prints[1]) and all(
            math.isclose(a, b, rel_tol=1e-2, abs_tol=2e-2) for a, b in zip(*prints, strict=True)
        )
        other += [] if same else ["weights (fingerprint)"]
    if other:
        raise ValueError(
            f"the report is of another model than the card: {', '.join(other)} differ; evaluate this one, e.g. "
            "zepad evaluate FOLDER"
        )


def _doubts(report: Report) -> list[str]:
    if not report.doubted:
        return []
    lines = "\n".join(f"> - {OVERESTIMATED} ({check['name']}): {check['detail']}" for check in report.failed_checks)
    return [
        f"> **The robust accuracies below are {OVERESTIMATED}.** The diagnostics of the evaluation found more than its "
        f"attacks did:\n>\n{lines}"
    ]


def _headline(report: Report) -> str:
    clean = report.row(report.default)
    first = f"On {clean['n']} images of `{clean['dataset']}` its accuracy is {percent(clean['accuracy'])} %"
    if T2.key not in report.threats:
        return f"{first}. **No white-box attack was run.**"
    worst = report.row(report.default, T2.key)
    return f"{first}, and {percent(worst['accuracy'])} % under a white-box attack at {_budget(worst)}."


def _opening(config: ZePADConfig) -> str:
    """What the model is, for readers who have seen none like it."""
    what = "A zero-shot image classifier" if config.zero_shot else "An image classifier"
    robust = sum(branch.role == "robust" for branch in config.branches)
    parts = [
        f"{what}, `{config.public_source}`, with a defence against adversarial examples: images changed so little that "
        "people see the same, while a model answers wrongly."
    ]
    if config.nothing_tuned:
        return parts[0]
    if 0 < robust < len(config.branches):
        one = robust == 1
        copies = "A robust copy of its encoder answers" if one else f"{robust} robust copies of its encoder answer"
        parts.append(f"{copies}{_share_of_public(config, 'the copy counts' if one else 'the copies count')}.")
    return " ".join(parts)


def _share_of_public(config: ZePADConfig, counting: str) -> str:
    """How the public encoder takes part, in words that hold for every cap of its weight."""
    if config.fusion != GATED_RULE:
        return " beside the public one"
    if config.rule_params.get("cap", config.gate.cap if config.gate else 1.0) == 0:
        return ", the public one has no say"
    return f" beside the public one: the more an image looks attacked, the more {counting}"


def _usage(config: ZePADConfig) -> str:
    if config.zero_shot:
        lines: tuple[str, ...] = (
            "from zepad_mm import RobustZeroShotClassifier",
            "",
            f'classify = RobustZeroShotClassifier.from_pretrained("{PLACEHOLDER}")',
            'classify("photo.jpg", ["a cat", "a dog"])',
        )
    else:
        lines = (
            "from zepad_mm import ZePAD",
            "",
            f'logits = ZePAD.from_pretrained("{PLACEHOLDER}")(images)  # (B, 3, H, W) in [0, 1]',
        )
    text = "## Use\n\n```python\n" + "\n".join(lines) + "\n```"
    if not config.zero_shot:
        return text
    pipeline = (
        "from transformers import pipeline",
        "",
        "import zepad_mm.pipelines  # registers the task",
        "",
        f'classify = pipeline("robust-zero-shot-image-classification", model="{PLACEHOLDER}")',
        'classify("photo.jpg", candidate_labels=["a cat", "a dog"])',
    )
    return f"{text}\n\nThe same as a pipeline of transformers:\n\n```python\n" + "\n".join(pipeline) + "\n```"


def _robustness(report: Report) -> str:
    lines, undefended = [], report.undefended
    for threat in report.threats:
        model, row = THREATS[threat], report.row(report.default, threat)
        before = "-" if model.default_only or undefended is None else cell(report.row(undefended, threat))
        name = model.description if model is CLEAN else f"{threat}: {model.description}"
        lines.append([name, _budget(row), before, cell(row)])
    head = ["threat model", "budget", "undefended", "this model"]
    notes = (
        "Accuracy in %, with its 95 % Wilson interval, in the worst case per image over all attacks of a line: an "
        "image counts only if it is answered right without an attack and under each."
        + (" T3 counts as right what is right or flagged." if T3.key in report.threats else "")
    )
    return f"## Robustness\n\n{notes}\n\n{markdown_table(head, lines)}\n\n{bullets(_effort(report))}"


def _effort(report: Report) -> Iterator[str]:
    """How strong the attacks of each threat model were, in words."""
    settings = report.meta["config"]["evaluation"]
    for threat in report.threats:
        rows = [row for row in report.rows if row["model"] == report.default and row["threat"] == threat]
        names = [row["attack"] for row in rows if row["attack"] != WORST and not row["control"]]
        attacks = ", ".join(f"`{name}`" for name in names)
        if THREATS[threat].universal or threat in (T1I.key, T1IB.key):
            yield f"{threat}: {attacks}."
        elif threat == T2.key:
            restarts = f"{settings['restarts']} restart{'s' if settings['restarts'] > 1 else ''}"
            fused = max(settings["restarts"], settings.get("fused_restarts", 1))  # absent from older reports
            restarts += f" ({fused} of the losses on the fusion)"
            kinds, targets = (dict.fromkeys(name.partition("@")[end] for name in names) for end in (0, 2))
            what, where = (", ".join(f"`{name}`" for name in found if name) for found in (kinds, targets))
            yield (
                f"T2: {settings['steps']} steps and {restarts} for attacks on single images; {len(names)} attacks in "
                f"all: {what}, made on {where}. Each of them is a row of the report."
            )
        elif threat == T3.key:
            yield f"T3: {settings['detector_steps']} steps each: {attacks}."


def _detection(config: ZePADConfig, report: Report) -> Iterator[str]:
    score = config.detector.score
    lines = [
        [
            f"{row['threat']} `{row['attack']}`",
            f"{row['auroc']:.3f}",
            *operating_points(row),
            str(row["n"]),
        ]
        for row in report.detection
        if row["score"] == score
    ]
    if not lines:
        return
    head = ["attack", "AUROC", *OPERATING_POINTS, "n"]
    alarms = [row for row in report.meta.get("false_alarms") or [] if row["score"] == score and row["kind"] != "clean"]
    unattacked = ""
    if alarms:
        most = max(alarms, key=lambda row: row["flagged_at_fpr5"])
        degree = f" (severity {most['severity']})" if most["severity"] else ""
        unattacked = (
            f"\n\nWithout any attack, under `{most['name']}`{degree} it flags {percent(most['flagged_at_fpr5'])} % of "
            f"the images at the threshold for 5 %, the most of the {len(alarms)} kinds tried."
        )
    note = (
        f"Score `{score}`. Nominal thresholds come from clean validation images, with the false alarms paid on test "
        "images in brackets; real ones from the test images. Advisory: an attacker who knows it evades it."
    )
    yield f"## Detection\n\n{note}\n\n{markdown_table(head, lines)}{unattacked}"


def _limitations(config: ZePADConfig, report: Report) -> Iterator[str]:
    clean = report.row(report.default)
    norms = sorted({row["norm"] for row in report.rows})
    yield (
        f"Measured on {clean['n']} images of `{clean['dataset']}` with seed {report.meta['seed']} only: nothing is "
        "known about other images and classes."
    )
    yield (
        "The intervals cover the choice of the images. They do not cover attacks that were not tried: on the same "
        "images a stronger attack can only lower the accuracy."
    )
    yield f"Budgets were measured in {', '.join(norms)} only; nothing is known about other changes to an image."
    absent = [f"{key} ({threat.description})" for key, threat in THREATS.items() if key not in report.threats]
    if absent:
        yield f"Not measured: {'; '.join(absent)}."
    classes = report.meta["config"]["model"]["class_names"]
    if tuple(classes) != config.class_names:
        yield f"It was evaluated for other classes than it is saved with: {', '.join(classes)}."
    if config.tuned_names:
        yield (
            f"Its robust branches were tuned with labels of {len(config.tuned_names)} class names only "
            f"({', '.join(config.tuned_names)}): on others both accuracies are much lower."
        )
    for source in config.sources:
        if is_local(source):
            yield f"The base encoder `{source}` is a local path: others cannot load this model."
    yield "The licence of the base encoder applies to this model too."


def _origin(report: Report) -> str:
    meta = report.meta
    versions = ", ".join(f"{name} {number}" for name, number in meta["versions"].items())
    return (
        f"## Where the numbers come from\n\n`zepad evaluate`, commit {meta['commit']}, seed {meta['seed']}, "
        f"{meta['hardware']}, {meta['wall_s']:.0f} s; {versions}."
    )


def _results(config: ZePADConfig, report: Report) -> Iterator[EvalResult]:
    """The accuracies as the Hub reads them, one for each threat model."""
    task = card_metadata(config)["pipeline_tag"]
    split = report.meta["config"]["evaluation"]["test_split"]
    for threat in report.threats:
        row = report.row(report.default, threat)
        what = "right or flagged" if THREATS[threat].flagged_is_right else "accuracy"
        name = what if threat == CLEAN.key else f"{what} under {threat}, {_budget(row)}, worst case per image"
        doubted = f" ({OVERESTIMATED})" if report.doubted and threat != CLEAN.key else ""
        copied: dict[str, Any] = {key: row[key] for key in ("threat", "norm", "epsilon", "n", "ci_low", "ci_high")}
        yield EvalResult(
            task_type=task,
            dataset_type=report.meta["config"].get("hub_data") or row["dataset"],
            dataset_name=row["dataset"],
            dataset_split=split,
            metric_type="accuracy",
            metric_name=name + doubted,
            metric_value=row["accuracy"],
            metric_args=copied,
        )


def _budget(row: dict[str, Any]) -> str:
    return "-" if row["threat"] == CLEAN.key else budget_of(row)
