#!/usr/bin/env python
"""The paper's tables on a zoo of encoders, from one configuration into ``results/paper``.

    python -m reproduction.build_ssl_zoo                                      # first: the encoders
    python -m reproduction.paper.run --config reproduction/paper/small.yaml        # some hours on two CPU cores
    python -m reproduction.paper.run --config reproduction/paper/small.yaml --tables "[main]" --victims "[simclr, dino]"

Tunings, heads and evaluations are kept in ``out`` and made once: a killed run resumes, and two may run on other victims
side by side. ``reproduction/paper/document.py`` writes ``docs/RESULTS.md`` from the committed records.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from reproduction.paper import figures  # noqa: F401 - registers its tables
from reproduction.paper.records import write_compact
from reproduction.paper.study import Settings, Study
from reproduction.paper.tables import TABLES
from reproduction.ssl_study import without_folders
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance


@dataclass(frozen=True, kw_only=True)
class PaperSettings(Settings):
    """The study and the tables to make."""

    tables: list[str] = field(default_factory=lambda: list(TABLES))  # names of TABLES


def main(config: PaperSettings) -> None:
    """Make the tables; the full records go to ``out``, what the document needs to ``result``."""
    makers = {name: TABLES.get(name) for name in config.tables}
    if config.threads:
        torch.set_num_threads(config.threads)
    study = Study(config)
    for name, make in makers.items():
        record = make(study)
        meta = without_folders(provenance(seed=config.seed, config=config.to_dict()))
        full = {"meta": meta, **without_folders(record)}
        write_json(study.out / "records" / f"{name}.json", full)
        write_compact(Path(config.result) / f"{name}.json", full)
        print(f"{name} written", flush=True)


if __name__ == "__main__":
    main(PaperSettings.from_cli())
