"""Published defences of CLIPs under one adaptive attack: measure the table, and write its record and page.

    python -m reproduction.cross_defence --model embedded --data-root DIR --out results/cross_defence.json
    python -m reproduction.cross_defence --data-root DIR --pack images.parquet       # test images in one file
    python -m reproduction.cross_defence --page results/cross_defence.json           # docs/CROSS_DEFENCE.md again

DIR holds folders of parquet files named like the tasks. On a GPU: ``--device cuda --workers 5``; where ``datasets`` is
not installed, ``--images images.parquet`` replaces ``--data-root``. A second start measures what is missing.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from reproduction.cross_defence.attacks import Strength
from reproduction.cross_defence.figure import write_figure
from reproduction.cross_defence.images import write_pack
from reproduction.cross_defence.page import FIGURE, PAGE, Table, page
from reproduction.cross_defence.table import TASKS, Settings, measure
from zepad_mm.cli.common import budget
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.stopping import run_program


def parser() -> argparse.ArgumentParser:
    """The command line; plain argparse, since a GPU machine may have nothing else."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="embedded", help="folder of the defended model under test")
    found.add_argument("--clip", default="open_clip:embedded", help="source of the public CLIP")
    found.add_argument("--branches", nargs="*", default=[], help="further models whose robust encoders get a row")
    found.add_argument("--caps", nargs="*", type=float, default=list(Settings.caps), help="of a gate, each gets a row")
    found.add_argument("--data-root", type=Path, help="folder of parquet folders")
    found.add_argument("--images", type=Path, help="a packed file, in place of --data-root")
    found.add_argument("--out", type=Path, default=Path("results/cross_defence.json"), help="the record")
    found.add_argument("--docs", type=Path, default=PAGE, help="the page")
    found.add_argument("--figure", type=Path, default=FIGURE, help="of the page")
    found.add_argument("--work", default="outputs/cross_defence", help="cells, perturbations and examples")
    found.add_argument("--device", default="cpu")
    found.add_argument("--workers", type=int, default=0, help="processes on that device; 0: this one")
    found.add_argument("--limit", type=float, help="seconds after which no further cell is begun")
    found.add_argument("--n", type=int, default=200, help="test images of each task")
    found.add_argument("--seed", type=int, default=0)
    budgets = list(Settings.epsilons)
    found.add_argument("--epsilons", nargs="+", type=budget, default=budgets, help="of the attacks, such as 4/255")
    found.add_argument("--tasks", nargs="*", default=list(TASKS))
    found.add_argument("--defences", nargs="*", default=[], help="keys of the defences; all if none is given")
    for name, value in Strength().to_dict().items():
        found.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    found.add_argument("--smoke", action="store_true", help="one step of everything: shows that it runs")
    found.add_argument("--pack", type=Path, help="write the images of the table into this file and end")
    found.add_argument("--page", type=Path, help="write the page of this record and end")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = parser().parse_args(arguments)
    if options.page:
        write_page(read_json(options.page), options)
        return
    place = options.images or options.data_root
    if place is None:
        raise SystemExit("give --data-root DIR, a folder of parquet folders, or --images FILE, made by --pack")
    if options.pack:
        counts = dict.fromkeys(options.tasks, (options.n, Settings.n_calibration))
        counts[options.tasks[-1]] = (options.n, Settings.n_surrogate)
        size = write_pack(place, options.tasks, options.pack, counts, options.seed)
        print(f"Written: {options.pack}, {size / 1e6:.1f} MB")
        return
    strength = Strength(**{name: getattr(options, name) for name in Strength().to_dict()})
    chosen = {
        key: getattr(options, key) for key in ("model", "clip", "work", "device", "workers", "limit", "n", "seed")
    }
    lists = {key: tuple(getattr(options, key)) for key in ("epsilons", "caps", "branches", "tasks", "defences")}
    settings = Settings.from_dict({**chosen, **lists, "images": str(place), "strength": strength})
    record = measure(smoke(settings) if options.smoke else settings)
    write_json(options.out, record)
    write_page(record, options)
    print(f"Written: {options.out}, {options.docs}, {record['meta']['cells_s']} s of attacks")


def write_page(record: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the page and the figure in it."""
    write_text(options.docs, page(record))
    write_figure(Table(record), options.figure)


def smoke(settings: Settings) -> Settings:
    """The same with the fewest steps and images."""
    weak = Strength(**dict.fromkeys(Strength().to_dict(), 1) | {"capacity": settings.strength.capacity, "draws": 2})
    return replace(
        settings,
        strength=weak,
        n_calibration=4,
        n_surrogate=16,
        universal=("feature_uap",),
        universal_steps={"feature_uap": 1},
        certify_n=8,
        certify_images=4,
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
