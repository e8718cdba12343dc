"""Defences: one file per tuning objective. Each is a frozen configuration that crafts and scores one batch."""

from zepad_mm.defences import clean as _clean
from zepad_mm.defences import fare as _fare
from zepad_mm.defences import gen_af as _gen_af
from zepad_mm.defences import mart as _mart
from zepad_mm.defences import pmg_aft as _pmg_aft
from zepad_mm.defences import tecoa as _tecoa
from zepad_mm.defences import trades as _trades
from zepad_mm.defences.base import DEFENCES, Batch, Defence, LossParts, Student, make_defence
from zepad_mm.defences.clean import Clean
from zepad_mm.defences.fare import FARE
from zepad_mm.defences.gen_af import GenAF, GenAFReleased, topology_loss
from zepad_mm.defences.gen_af_stage2 import robustness_contributions, thaw_redundant
from zepad_mm.defences.mart import MART
from zepad_mm.defences.pmg_aft import PMGAFT
from zepad_mm.defences.tecoa import TeCoA
from zepad_mm.defences.trades import TRADES

__all__ = [
    "DEFENCES",
    "FARE",
    "MART",
    "PMGAFT",
    "TRADES",
    "Batch",
    "Clean",
    "Defence",
    "GenAF",
    "GenAFReleased",
    "LossParts",
    "Student",
    "TeCoA",
    "make_defence",
    "robustness_contributions",
    "thaw_redundant",
    "topology_loss",
]
del _clean, _fare, _gen_af, _mart, _pmg_aft, _tecoa, _trades
