#!/usr/bin/env python
"""The tables of the gate study.

python -m reproduction.gate_tables results/gate.json [results/gate_transfer.json]      # writes gate.md beside the first

A second record, of the same gate, holds attacks on each image of further sets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import binomtest

from reproduction.gate_study import SEVERITY
from zepad_mm.utils.io import read_json, write_text
from zepad_mm.utils.text import interval_text, markdown_table, percent

PAGE = """# The feature gate over {sets} data sets

{n} test images of each set, {gates}, made on {hardware}. This page is generated from `gate.json` by
`python -m reproduction.gate_tables {files}`; the records come from

{commands}

The robust encoder, the gate and its threshold saw no test image. "Gate" is the answer of both encoders with the benign
weight of the gate, at the cap {cap:g}. T1 and T1i are made on the public encoder: the attacker does not know the
defence. The white box below shows what is left against an attacker who does. Perturbations that lie in the work folder
are read, not crafted again: the time and the machine of their crafting are not in the record.

## Clean accuracy and the strongest universal perturbation (10/255)

Top-1 in percent; T1 is the lowest accuracy under any single one of {universal}.

{clean}

## Detection

AUROC of the gate's logit, clean against attacked images; false alarms and share caught at the threshold that the gate
was calibrated with. Unseen: kinds of attacks that were not in its training.

{detection}

False alarms on everyday corruptions (severity {severity}), mean over sets: {corruptions}.

## By the seed of the gate

{seeds}

## Attacks on each image, made on the public encoder (T1i)

{transfer}

## White box (T2, 4/255)

Right answers after PGD, momentum PGD, APGD on cross-entropy and targeted APGD in turn; cap 0 is the robust encoder
alone.

{white_box}
"""


def render(record: dict[str, Any], further: dict[str, Any] | None = None) -> str:
    """The page of a record, with the per-image attacks of a further one."""
    records = [record, *([further] if further else [])]
    sets, caps = record["sets"], record["caps"]
    config = record["meta"]["config"]
    gate = next(iter(config["gates"]))
    cap = caps.index(record["cap"])
    seen = set(config["gates"][gate]["seen_attacks"])
    return PAGE.format(
        sets=len(sets),
        n=", ".join(sorted({str(one["n"]) for one in sets.values()})),
        hardware=record["meta"]["hardware"],
        files=" ".join(f"results/{name}.json" for name in ("gate", "gate_transfer")[: len(records)]),
        commands="\n".join(f"    {one['command']}" for one in records),
        gates=f"the gate {gate!r} of {len(config['gates'])}",
        seeds=_seeds(sets, config["gates"], cap),
        cap=caps[cap],
        universal=", ".join(dict.fromkeys(row["attack"] for row in _of(sets, "T1"))),
        clean=_clean(sets, gate, cap),
        detection=_detection(sets, gate, seen),
        severity=SEVERITY,
        corruptions=_corruptions(sets, gate),
        transfer=_transfer([each for one in records for each in one["sets"].items()], gate, cap),
        white_box=_white_box(sets),
    )


def _of(sets: dict[str, Any], threat: str) -> list[dict[str, Any]]:
    return [row for one in sets.values() for row in one["rows"] if row["threat"] == threat]


def _clean(sets: dict[str, Any], gate: str, cap: int) -> str:
    lines, found = [], []
    for name, one in sets.items():
        clean = _only(one["rows"], "clean")
        attacked = [row for row in one["rows"] if row["threat"] == "T1"]
        found.append([
            clean["undefended"], clean["robust"], clean["gates"][gate]["by_cap"][cap],
            *(min(row[key] for row in attacked) for key in ("undefended", "robust")),
            min(row["gates"][gate]["by_cap"][cap] for row in attacked),
        ])  # fmt: skip
        lines.append([name, str(one["classes"]), *map(percent, found[-1])])
    lines.append(["mean", "", *(percent(mean(column)) for column in zip(*found, strict=True))])
    header = ["set", "classes", "undefended", "robust", "gate", "T1 undefended", "T1 robust", "T1 gate"]
    return markdown_table(header, lines)


def _detection(sets: dict[str, Any], gate: str, seen: set[str]) -> str:
    lines = []
    for name, one in sets.items():
        attacked = [row for row in one["rows"] if row["threat"] == "T1"]
        groups = [[row for row in attacked if (row["attack"] in seen) == kind] for kind in (True, False)]
        line = [name, percent(_only(one["rows"], "clean")["gates"][gate]["flagged"])]
        for group in groups:
            found = [row["gates"][gate] for row in group]
            line += [f"{mean(row['auroc'] for row in found):.3f}", f"{min(row['auroc'] for row in found):.3f}"]
        lines.append([*line, percent(mean(row["gates"][gate]["flagged"] for row in attacked))])
    header = ["set", "false alarms", "seen: mean", "worst", "unseen: mean", "worst", "caught"]
    return markdown_table(header, lines)


def _corruptions(sets: dict[str, Any], gate: str) -> str:
    found: dict[str, list[float]] = {}
    for row in _of(sets, "corruption"):
        found.setdefault(row["attack"], []).append(row["gates"][gate]["flagged"])
    return ", ".join(f"{name} {percent(mean(shares))} %" for name, shares in found.items()) or "not measured"


def _seeds(sets: dict[str, Any], gates: dict[str, Any], cap: int) -> str:
    """What each gate gives: over the sets, and the worst cell."""
    lines = []
    for name, config in gates.items():
        seen = set(config["seen_attacks"])
        clean = [_only(one["rows"], "clean") for one in sets.values()]
        kept = [row["gates"][name]["by_cap"][cap] - row["undefended"] for row in clean]
        attacked = _of(sets, "T1")
        held = [row["gates"][name]["by_cap"][cap] - row["robust"] for row in attacked]
        groups = [[row["gates"][name]["auroc"] for row in attacked if (row["attack"] in seen) == kind]
                  for kind in (True, False)]  # fmt: skip
        transfer = [row["gates"][name]["auroc"] for row in _of(sets, "T1i")]
        lines.append([
            name, *(f"{round(100 * value, 1) + 0.0:+.1f}" for value in (mean(kept), min(kept), mean(held), min(held))),
            *(f"{mean(group):.3f}" for group in groups), f"{min(groups[0] + groups[1]):.3f}",
            f"{mean(transfer):.3f}" if transfer else "", percent(mean(row["gates"][name]["flagged"] for row in clean)),
        ])  # fmt: skip
    header = [
        "gate", "clean - undefended: mean", "worst", "T1 - robust: mean", "worst", "AUROC seen", "unseen", "worst",
        "T1i", "false alarms",
    ]  # fmt: skip
    return markdown_table(header, lines)


def _transfer(sets: Iterable[tuple[str, Any]], gate: str, cap: int) -> str:
    lines = []
    for name, one in sets:
        for row in one["rows"]:
            if row["threat"] == "T1i":
                found = row["gates"][gate]
                lines.append([
                    name, f"{row['attack']} {row['epsilon']}/255", percent(row["undefended"]), percent(row["robust"]),
                    percent(found["by_cap"][cap]), f"{found['auroc']:.3f}", percent(found["flagged"]),
                ])  # fmt: skip
    header = ["set", "attack", "undefended", "robust", "gate", "AUROC", "caught"]
    return markdown_table(header, lines) if lines else "Not measured."


def _white_box(sets: dict[str, Any]) -> str:
    lines = []
    for name, one in sets.items():
        for row in one["rows"]:
            if row["threat"] == "T2":
                first, last, n = row["right"][0], row["right"][-1], row["n"]
                lines.append([name, f"{row['cap']:g}", str(n), percent(first / n), _share(last, n)])
    return markdown_table(["set", "cap", "n", "clean", "T2"], lines) if lines else "Not measured."


def _share(hits: int, n: int) -> str:
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return interval_text(hits / n, float(interval.low), float(interval.high))


def _only(rows: Iterable[dict[str, Any]], threat: str) -> dict[str, Any]:
    return next(row for row in rows if row["threat"] == threat)


if __name__ == "__main__":
    paths = [Path(word) for word in sys.argv[1:]]
    write_text(paths[0].with_suffix(".md"), render(*map(read_json, paths)))
