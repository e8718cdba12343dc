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
from reproduction.paper.sections import SECTIONS
from zepad_mm.utils.io import write_text

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "results", ROOT / "docs" / "RESULTS.md"
INTRODUCTION = """# The paper's results, and ours

ZePAD (Lei, Yang, Zhang; ICLR 2026) next to measurements with this library and small encoders on CPUs. Column "paper":
its published results, partly at second hand, with ResNet-18s of 1000 epochs at 64 px. Column "ours": encoders of 1.25
M parameters, ten epochs of half of CIFAR-10 at 32 px, one seed. Compare rows within a table; absolute levels are not
comparable with the paper's. Accuracies in %, 95 % Wilson intervals in brackets.

Written by `reproduction/paper/document.py` from `results/`; each JSON names commit, configuration, seed, n, hardware
and library versions. To reproduce: `python -m reproduction.build_ssl_zoo`, then
`python -m reproduction.paper.run --config reproduction/paper/small.yaml`; at the paper's scale on GPUs: `full.yaml`.
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
    for title, path, write in SECTIONS:
        parts.append(f"## {title}\n")
        found = results / path
        parts.append(write(read_compact(found)) if found.is_file() else "Not measured yet.\n")
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
