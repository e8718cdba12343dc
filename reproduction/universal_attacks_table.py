#!/usr/bin/env python
"""Every registered universal attack on the undefended embedded CLIP, scored on that CLIP and on the shipped defence.

    python -m reproduction.universal_attacks_table --config reproduction/configs/universal_attacks.yaml

One evaluation of the threat models T1 and T1p. Writes dae_attacks.json and .md into --result; perturbations and
predictions per image stay in --out, and a second start resumes there. The attacker has unlabelled surrogate images;
accuracies are those on test images. Each attack runs with its defaults, chosen on validation images of this encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zepad_mm import ZePAD, evaluate
from zepad_mm.attacks import UNIVERSAL_ATTACKS
from zepad_mm.evaluation import EvalSettings, Report, RowKind, subject_of
from zepad_mm.evaluation.settings import PATCHES
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import write_json, write_text
from zepad_mm.utils.text import budget_text, interval_text, markdown_table

NAME = "dae_attacks"


@dataclass(frozen=True, kw_only=True)
class UniversalTable(Config):
    """Settings of the table."""

    attacks: tuple[str, ...] = tuple(UNIVERSAL_ATTACKS)  # names of UNIVERSAL_ATTACKS
    evaluation: EvalSettings = field(default_factory=EvalSettings)  # budgets, images and, per attack, steps
    out: str = "outputs/universal_attacks"  # folder of the evaluation
    result: str = "results"  # folder of the two result files


def main(config: UniversalTable) -> Report:
    """Craft, score and write both files; returns the report."""
    subject = subject_of(ZePAD.from_pretrained("embedded"))
    kept = (RowKind.DEFAULT, RowKind.UNDEFENDED)
    subject = replace(subject, rows=tuple(row for row in subject.rows if row.kind in kept))
    settings = replace(
        config.evaluation,
        threats=("T1", "T1p"),
        universal=tuple(name for name in config.attacks if name not in PATCHES),
        patches=tuple(name for name in config.attacks if name in PATCHES),
        diagnostics_n=0,
    )
    report = evaluate(subject, settings=settings, out=Path(config.out), resume=True)
    report = Report(report.meta, [row for row in report.rows if row["attack"] != "worst"])
    path = Path(config.result) / f"{NAME}.json"
    write_json(path, {"meta": report.meta, "rows": report.rows})
    write_text(path.with_suffix(".md"), markdown(report))
    return report


def markdown(report: Report) -> str:
    """The table, strongest attack first; marks attacks that are not clearly stronger than noise."""
    meta = report.meta
    settings, undefended = meta["config"]["evaluation"], report.undefended or ""
    noise = {row["norm"]: row for row in report.rows if row["control"] and row["model"] == undefended}
    attacked = [row for row in report.rows if row["model"] == undefended and row["threat"] != "clean"]
    lines = [["none", "", _cell(report.row(undefended)), "", _cell(report.row(report.default)), ""]]
    for row in sorted(attacked, key=lambda row: row["accuracy"]):
        if row["control"]:
            continue
        control = noise[row["norm"]]
        weak = "" if row["ci_high"] < control["ci_low"] else " (not clearly below)"
        defended = report.row(report.default, row["threat"], row["attack"])
        budget = budget_text(row["epsilon"], row["norm"])
        cells = [_cell(row) + weak, _cell(control), _cell(defended)]
        lines.append([row["algorithm"], budget, *cells, f"{row['seconds']:.0f}"])
    head = ["attack", "budget", "undefended CLIP", "noise", "ZePAD as shipped", "crafting, s"]
    return (
        "# Downstream-agnostic attacks on the embedded CLIP\n\n"
        "Threat models T1 and T1p: each perturbation is crafted on the undefended public encoder alone, from "
        f"{settings['n_surrogate']} unlabelled images; the defence itself is not attacked. Accuracy in % on "
        f"{attacked[0]['n']} test images with 95 % Wilson intervals, seed {meta['seed']}. L-inf budget "
        f"{255 * settings['epsilon_universal']:.3g}/255; patches cover at most their share of the area, in the centre. "
        "Noise is one random pattern of the same budget, on the undefended CLIP.\n\n"
        f"{markdown_table(head, lines)}\n\n"
        f"Written by `reproduction/universal_attacks_table.py`, commit {meta['commit']}, {meta['hardware']}, torch "
        f"{meta['versions']['torch']}.\n"
    )


def _cell(row: dict[str, Any]) -> str:
    return interval_text(row["accuracy"], row["ci_low"], row["ci_high"])


if __name__ == "__main__":
    print(markdown(main(UniversalTable.from_cli())))
