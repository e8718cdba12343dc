"""Tuning objectives, one frozen configuration per file, that craft adversarial images and score a batch."""

from zepad_mm.defences.base import DEFENCES, Batch, Defence, LossParts, Student, make_defence
from zepad_mm.defences.clean import Clean
from zepad_mm.defences.fare import FARE
from zepad_mm.defences.gen_af import GenAF, GenAFReleased, topology_loss
from zepad_mm.defences.gen_af_stage2 import robustness_contributions, unfreeze_redundant
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
    "topology_loss",
    "unfreeze_redundant",
]
