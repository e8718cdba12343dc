#!/usr/bin/env python
"""Fusion-aware attacks next to generic APGD-T, on the shipped branches under the paper's rule (logit RFDM, k = 3).

    python -m reproduction.adaptive_table --config reproduction/configs/adaptive.yaml

Each attack is an evaluation of its own, so that it starts from all images that are answered correctly. Writes
adaptive_on_rfdm.json and .md into --result; predictions per image stay in --out. A second start resumes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zepad_mm import ZePAD, evaluate
from zepad_mm.attacks import FUSED_LOSSES
from zepad_mm.evaluation import EvalSettings, Records, subject_of
from zepad_mm.evaluation.metrics import share
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import write_json, write_text
from zepad_mm.utils.provenance import provenance
from zepad_mm.utils.text import interval_text, markdown_table

NAME = "adaptive_on_rfdm"
GENERIC = "apgd_targeted"


@dataclass(frozen=True, kw_only=True)
class AdaptiveTable(Config):
    """Settings of the table."""

    evaluation: EvalSettings = field(default_factory=EvalSettings)  # budget, steps and images
    out: str = "outputs/adaptive"  # folder of the evaluations
    result: str = "results"  # folder of the two result files


def main(config: AdaptiveTable) -> dict[str, Any]:
    """Run every attack and write both files; returns the record."""
    model = ZePAD.from_pretrained("embedded").set_fusion("rfdm")
    subject = subject_of(model, rules=("rfdm",))
    subject = replace(subject, rows=subject.rows[:1])
    settings = replace(config.evaluation, threats=("T2",), pools=(), restarts=1, diagnostics_n=0)
    record: dict[str, Any] = {"meta": provenance(seed=settings.seed, config=settings.to_dict()), "attacks": {}}
    survived = []
    for name in (GENERIC, *FUSED_LOSSES):
        if name == GENERIC:
            attack: dict[str, Any] = {"own_attacks": (GENERIC,), "adaptive": ()}
            runs = min(settings.targets, len(model.class_names) - 1)
        else:
            attack = {"own_attacks": (), "adaptive": (name,)}
            runs = len(FUSED_LOSSES.get(name)(model.fuse, len(model.branches)))
        out = Path(config.out) / name
        report = evaluate(subject, settings=replace(settings, **attack), out=out, resume=True)
        row = report.row(report.default, "T2")
        record["clean"] = _interval(report.row(report.default))
        record["attacks"][name] = {**_interval(row), "runs": runs, "seconds": round(row["seconds"], 1)}
        if name != GENERIC:
            survived.append(Records.load(out).worst(report.default, "T2"))
    worst = share(torch.stack(survived).all(0))
    record["adaptive"] = {"accuracy": worst.value, "ci_low": worst.interval[0], "ci_high": worst.interval[1]}
    record["strongest"] = min(record["attacks"], key=lambda name: record["attacks"][name]["accuracy"])
    path = Path(config.result) / f"{NAME}.json"
    write_json(path, record)
    write_text(path.with_suffix(".md"), markdown(record))
    return record


def markdown(record: dict[str, Any]) -> str:
    """The table, strongest attack first."""
    meta, settings = record["meta"], record["meta"]["config"]
    lines = [["none", "", _cell(record["clean"]), ""]]
    for name, row in sorted(record["attacks"].items(), key=lambda item: item[1]["accuracy"]):
        title = f"{name} (generic)" if name == GENERIC else name
        lines.append([title, f"{row['runs']}", _cell(row), f"{row['seconds']}"])
    lines.append(["all of FUSED_LOSSES, worst per image", "", _cell(record["adaptive"]), ""])
    strongest = record["strongest"]
    return (
        "# Adaptive attacks on the paper's rule\n\n"
        f"Shipped branches under logit RFDM, {settings['n']} test images, L-inf {255 * settings['epsilon']:.3g}/255, "
        f"{settings['steps']} steps per run. Written by "
        f"`reproduction/adaptive_table.py`, commit {meta['commit']}.\n\n"
        f"{markdown_table(['attack', 'runs', 'robust accuracy in %', 'seconds'], lines)}\n\n"
        f"Strongest attack: `{strongest}`, {100 * record['attacks'][strongest]['accuracy']:.1f} %.\n"
    )


def _interval(row: dict[str, Any]) -> dict[str, float]:
    return {key: row[key] for key in ("accuracy", "ci_low", "ci_high")}


def _cell(row: dict[str, float]) -> str:
    return interval_text(row["accuracy"], row["ci_low"], row["ci_high"])


if __name__ == "__main__":
    print(markdown(main(AdaptiveTable.from_cli())))
