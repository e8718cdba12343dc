#!/usr/bin/env python
"""The paper's tables on a zoo of encoders, from one configuration into ``results/paper``.

    python -m reproduction.build_ssl_zoo                                      # first: the encoders
    python -m reproduction.paper.run --config reproduction/paper/small.yaml        # some hours on two CPU cores
    python -m reproduction.paper.run --config reproduction/paper/small.yaml --tables "[main]" --victims "[simclr, dino]"

Everything lies in ``out`` and is made once: a killed run goes on where it was, and two may work on other victims side
by side. ``--tables`` picks some of them; ``--fill true`` stores what they need and writes none.
``reproduction/paper/document.py`` makes ``docs/RESULTS.md`` of the committed ones.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from reproduction.paper import figures  # noqa: F401 - registers its tables
from reproduction.paper.records import write_compact
from reproduction.paper.study import ROOT, Settings, Study, without_folders
from reproduction.paper.tables import TABLES
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance


def parse(arguments: list[str] | None = None) -> tuple[Settings, list[str], bool]:
    """Settings, names of tables, and whether only the store is to be filled; unknown keys are errors."""
    parser = ArgumentParser(description=__doc__, formatter_class=DefaultHelpFormatter)
    parser.add_argument("--config", action="config", help="YAML file with the settings below")
    parser.add_argument("--tables", type=list[str], default=list(TABLES), help=f"of {', '.join(TABLES)}")
    parser.add_argument("--fill", type=bool, default=False, help="store what the tables need, write none of them")
    parser.add_class_arguments(Settings)
    given: dict[str, Any] = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    given.pop("config")
    chosen, fill = given.pop("tables"), given.pop("fill")
    return Settings(**given), chosen, fill


def main(arguments: list[str] | None = None) -> None:
    config, chosen, fill = parse(arguments)
    makers = {name: TABLES.get(name) for name in chosen}
    if config.threads:
        torch.set_num_threads(config.threads)
    study = Study(config)
    for name, make in makers.items():
        record = make(study)
        if fill:
            continue
        meta = without_folders(provenance(seed=config.seed, config=asdict(config)))
        path = Path(config.result) / f"{name}.json"
        whole = {"meta": meta, **without_folders(record)}
        write_json(study.out / "records" / path.name, whole)
        write_compact(path, whole)
        print(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name} written", flush=True)


if __name__ == "__main__":
    main()
