"""Published test-time and training-free defences of CLIPs under one adaptive attack.

    python -m reproduction.cross_defence --model FOLDER --clip SOURCE --data-root DIR --out results/cross_defence.json

Where to find what::

    base.py          what a defence provides; the registry
    ttc.py, csr.py, agc.py, r_adapt.py, interpolation.py, smoothing.py, fusions.py   the defences, one idea each
    images.py        test images from parquet folders or one packed file
    cost.py          passes and time of an answer
    attacks.py       what the authors attacked with, the adaptive attack, scoring
    table.py         all cells of the table, in several processes, resumable
    page.py          docs/CROSS_DEFENCE.md from the record
    figure.py        the figure of the page
"""

from reproduction.cross_defence import agc, csr, fusions, interpolation, r_adapt, smoothing, ttc
from reproduction.cross_defence.base import DEFENCES, Defence, Parts, Path, Plain

__all__ = [
    "DEFENCES",
    "Defence",
    "Parts",
    "Path",
    "Plain",
    "agc",
    "csr",
    "fusions",
    "interpolation",
    "r_adapt",
    "smoothing",
    "ttc",
]
