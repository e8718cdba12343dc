#!/usr/bin/env python
"""Write the measured parts of the documents, the card of the shipped model and report.md from committed results.

    scripts/demo --out results/demo && python -m tools.render_docs

``--check`` changes nothing and exits with 1 when one of them is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools.front_page import between, front_page
from tools.gpu_readme import GPU, gpu_readme
from tools.lowest_versions import MARKS as VERSION_MARKS
from tools.lowest_versions import RECORD as LOWEST_VERSIONS
from tools.lowest_versions import sentence
from tools.recipes_readme import recipes_readme
from tools.threat_figures import MARKS as FIGURE_MARKS
from tools.threat_figures import figures_block
from zepad_mm.evaluation import THREATS, Report, RowKind
from zepad_mm.evaluation.model_card import model_card
from zepad_mm.evaluation.report import JSON, MARKDOWN, budget_of, by_strength
from zepad_mm.evaluation.report_text import strongest_single
from zepad_mm.evaluation.threats import CLEAN, T1, T2
from zepad_mm.models.card import PLACEHOLDER
from zepad_mm.models.config import ZePADConfig
from zepad_mm.models.serialization import CONFIG, EMBEDDED_MODEL
from zepad_mm.utils.io import read_json, write_text
from zepad_mm.utils.text import bullets, markdown_table, percent

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "results" / "demo"
PAPERS_RULE = "rfdm"
MARKS = ("<!-- table: written by tools/render_docs.py from results/demo/report.json -->", "<!-- /table -->")
NOT_MEASURED = "The shipped model is not measured yet; `scripts/demo` writes its table."


def demo_block(report: Report) -> str:
    """The accuracies, what they mean, detection, and the warnings of the report."""
    parts = [accuracy_table(report), *explanation(report), *detection_table(report)]
    if report.meta["warnings"]:
        parts += ["Warnings of the report:", bullets(report.meta["warnings"])]
    return "\n\n".join(parts)


def accuracy_table(report: Report) -> str:
    """A line for each model that a reader compares, a column for each threat model with one row per model."""
    config = report.meta["config"]["model"]
    paper = f"{report.default}:{PAPERS_RULE}"
    titles = {report.undefended: "undefended CLIP"}
    titles |= {
        name: f"branch {about['name']} alone ({about['objective']})"
        for name, about in zip(report.models_of(RowKind.BRANCH), config["branches"], strict=True)
    }
    titles |= {"baseline:equal": "equal-weight ensemble of the branches", paper: "ZePAD, the paper's rule (RFDM)"}
    titles |= {report.default: f"**ZePAD, default rule** (`{config['fusion']}`)"}
    threats = [CLEAN.key, *(key for key in by_strength(report) if not THREATS[key].default_only)]
    head = ["accuracy in %, ± half a 95 % interval"]
    head += [key if key == CLEAN.key else f"{key}, {budget_of(report.row(report.default, key))}" for key in threats]
    lines = [
        [title, *(with_half_interval(report.row(model, key)) for key in threats)]
        for model, title in titles.items()
        if model in report.models
    ]
    return markdown_table(head, lines)


def with_half_interval(row: dict[str, Any]) -> str:
    at_most = "≤ " if row.get("upper_bound") else ""
    return f"{at_most}{percent(row['accuracy'])} ± {percent((row['ci_high'] - row['ci_low']) / 2)}"


def explanation(report: Report) -> list[str]:
    """What the accuracies mean, white-box attack first."""
    default, undefended, meta = report.default, report.undefended, report.meta
    assert undefended is not None
    clean, white_box = report.row(default), report.row(default, T2.key)
    paper = report.row(f"{default}:{PAPERS_RULE}", T2.key)
    at_most = "at most " if paper["upper_bound"] else ""
    lost = white_box["asr_correct"]
    singles = {name: strongest_single(report, name, T1.key) for name in (undefended, default)}
    count = len(report.counted(default, T1.key))
    succeeds = "always succeeds" if white_box["accuracy"] == 0 else "still succeeds often"
    return [
        f"n = {clean['n']} clothing photos that no training and no selection has used, zero-shot over ten class names, "
        "one seed, the small embedded CLIP; every cell is the worst case per image over all attacks of its column.",
        f"**A white-box attack {succeeds}**: changing no pixel by more than {budget_of(white_box)}, it "
        f"breaks {100 * lost:.0f} % of the answers that ZePAD gets right on clean images "
        f"({percent(clean['accuracy'])} to {percent(white_box['accuracy'])} %). Under the strongest one perturbation "
        f"made on the public encoder the undefended CLIP falls from {percent(report.accuracy(undefended))} to "
        f"{percent(singles[undefended]['accuracy'])} %, ZePAD to {percent(singles[default]['accuracy'])} %; in the "
        f"worst case per image over {count} perturbations to {percent(report.accuracy(undefended, T1.key))} and "
        f"{percent(report.accuracy(default, T1.key))} %. The default rule is not the paper's: under the same "
        f"white-box attack the paper's rule has {at_most}{percent(paper['accuracy'])} %. The rule was selected on "
        "validation images (`zepad_mm/assets/zepad/build.json`).",
        f"Measured by `scripts/demo` at commit {meta['commit']} in {meta['wall_s'] / 60:.1f} minutes, on "
        f"{meta['hardware']}.",
    ]


def detection_table(report: Report) -> list[str]:
    """Detection, plain and adaptive, by the paper's score and by the deployed one."""
    deployed = report.meta["config"]["model"]["detector"]["score"]
    titles = {"confidence_gap": "the paper's gap", deployed: f"`{deployed}`"}
    lines = [
        [
            titles[row["score"]],
            row["threat"],
            row["attack"],
            f"{row['auroc']:.2f}",
            f"{100 * row['tpr_at_fpr1']:.0f} / {100 * row['tpr_at_fpr5']:.0f} %",
            "" if row["accuracy_paper_rule"] is None else f"{100 * row['accuracy_paper_rule']:.0f} % right",
        ]
        for row in report.detection
        if row["score"] in titles and row["model"] == report.default
    ]
    if not lines:
        return []
    head = ["score", "threat", "attack", "AUROC", "TPR at 1 % / 5 % FPR", "paper's rule"]
    note = "Detection is advisory: an attacker who also attacks the detector evades it."
    return [note, markdown_table(head, lines)]


def demo_page(old: str) -> str:
    """The page of the shipped model with the block between its marks written again."""
    report = demo_report()
    return between(old, MARKS, NOT_MEASURED if report is None else demo_block(report).rstrip())


def threats_page(old: str) -> str:
    """The page of the threat models with its figures and their captions written again."""
    return between(old, FIGURE_MARKS, figures_block())


def install_page(old: str) -> str:
    """The page of the installation with its sentence about the lowest versions written again."""
    return between(old, VERSION_MARKS, sentence(read_json(LOWEST_VERSIONS)))


def demo_report() -> Report | None:
    """The committed report of the shipped model; None where it is not measured yet."""
    return Report.load(DEMO) if (DEMO / JSON).is_file() else None


def card(_: str) -> str:
    """The card of the shipped model."""
    config = ZePADConfig.from_dict(read_json(EMBEDDED_MODEL / CONFIG))
    text = model_card(config, demo_report()).replace(f', model="{PLACEHOLDER}"', "")  # the task's own default
    return text.replace(PLACEHOLDER, "embedded")


def report_file(results: Path, _: str) -> str:
    """The report.md beside a committed report.json."""
    return Report.load(results).markdown()


def writers() -> dict[Path, Callable[[str], str]]:
    """Document to the function from its old text to its new one."""
    found: dict[Path, Callable[[str], str]] = {
        ROOT / "README.md": front_page,
        ROOT / "docs" / "install.md": install_page,
        ROOT / "docs" / "shipped_model.md": demo_page,
        ROOT / "docs" / "threats.md": threats_page,
        ROOT / "recipes" / "README.md": recipes_readme,
        GPU / "README.md": gpu_readme,
        EMBEDDED_MODEL / "README.md": card,
    }
    if demo_report() is not None:
        found[DEMO / MARKDOWN] = partial(report_file, DEMO)
    return found


def stale_documents(*, write: bool = False) -> list[str]:
    """The documents that differ from their records; with ``write`` they are written again."""
    stale = []
    for path, renew in writers().items():
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        new = renew(old)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if write:
                write_text(path, new)
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    args = parser.parse_args()
    stale = stale_documents(write=not args.check)
    if args.check:
        print(f"out of date: {', '.join(stale)}; run without --check" if stale else "up to date")
        sys.exit(bool(stale))


if __name__ == "__main__":
    main()
