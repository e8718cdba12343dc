#!/usr/bin/env python
"""Write ``docs/RESULTS.md`` from the JSON files of ``results``.

python -m reproduction.paper.document            # --check changes nothing and exits with 1 when it is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reproduction.paper import published
from reproduction.paper.records import read_compact
from reproduction.paper.sections import SECTIONS, STRONG_SECTIONS
from reproduction.paper.sections_strong import summary
from zepad_mm.utils.io import write_text

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "results", ROOT / "docs" / "RESULTS.md"
INTRODUCTION = """# The paper's results, and ours

ZePAD (Lei, Yang, Zhang; ICLR 2026) next to measurements with this library. The paper's encoders are ResNet-18s of
1000 epochs at 64 px; its results are partly at second hand. Ours are of two kinds: the **strong zoo**, which begins
from ImageNet weights, so that there is something to lose and to defend, and the **small zoo** from random weights, on
CPUs, with the widest choice of tunings. Compare rows within a table; absolute levels are not comparable with the
paper's. Accuracies in %, 95 % Wilson intervals in brackets; one seed, unless a table names several.

Written by `reproduction/paper/document.py` from `results/`; each JSON names commit, configuration, seed, n, hardware
and library versions. BA: clean accuracy; RA: accuracy under attack; T1: made on the undefended victim; T2: through the
whole defence; ASR: attack success rate.
"""
STRONG = """# The strong zoo

To reproduce: `python -m tools.image_tower --out outputs/strong_zoo/imagenet`, then `python -m
reproduction.build_ssl_zoo --config recipes/configs/strong_zoo/pretrain.yaml --out outputs/strong_zoo`, then `python -m
reproduction.paper.run --config reproduction/paper/strong.yaml`. In the record, pre-training, FARE of seed 0, and Gen-AF
of moco_v2_plus, vibcreg and w_mse ran on a GPU, and these weights were kept in half precision. All else ran on a CPU:
Gen-AF of the other victims, every other tuning, gates, heads, attacks, and the benign encoder of the paper's design,
for one epoch (`results/paper_strong/benign.json`).
"""
SMALL = """# The small zoo

Encoders of 1.25 M parameters, ten epochs of half of CIFAR-10 at 32 px. These encoders are weak: the attacks take little
from them, so that no defence can win much back. To reproduce: `python -m reproduction.build_ssl_zoo`, then `python -m
reproduction.paper.run --config reproduction/paper/small.yaml`; at the paper's scale on GPUs: `full.yaml`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only report whether it is up to date")
    args = parser.parse_args()
    new = document(RESULTS)
    old = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.is_file() else ""
    if new != old and not args.check:
        write_text(DOCUMENT, new)
    if args.check:
        print("up to date" if new == old else "docs/RESULTS.md is not what the results say; run without --check")
        sys.exit(new != old)


def document(results: Path) -> str:
    """The whole document, from a folder of results."""
    parts = [INTRODUCTION]
    summarised = [results / name for name in ("paper_strong/main.json", "paper_strong/clean.json", "demo/report.json")]
    if all(path.is_file() for path in summarised):
        parts.append("## Summary\n\n" + summary(*map(read_compact, summarised)))
    for introduction, sections in ((STRONG, STRONG_SECTIONS), (SMALL, SECTIONS)):
        parts.append(introduction)
        missing = [title for title, path, _ in sections if not (results / path).is_file()]
        if missing:
            parts.append(f"Not measured on these encoders: {'; '.join(missing)}.\n")
        for title, path, write in sections:
            if title not in missing:
                parts.append(f"## {title}\n\n{write(read_compact(results / path))}")
    parts.append(state())
    return "\n".join(parts).rstrip() + "\n"


def state() -> str:
    """Every system and result of the paper, with its state in this library."""
    lines = [
        "## Systems and results of the paper, and their state\n",
        "| item | what it is | state | where |",
        "|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in published.STATE]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
