"""Attacks: per-sample ones on any callable, universal ones on encoders. They never import models."""

from zepad_mm.attacks.apgd import APGD
from zepad_mm.attacks.base import ATTACKS, Attack, frozen
from zepad_mm.attacks.gradient import PGD
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.perturbation import Perturbation
from zepad_mm.attacks.square import Square
from zepad_mm.attacks.universal import UNIVERSAL_ATTACKS, AdvEncoder, FeatureUAP, UniversalAttack

__all__ = [
    "APGD",
    "ATTACKS",
    "FEATURE_LOSSES",
    "LOGIT_LOSSES",
    "PGD",
    "UNIVERSAL_ATTACKS",
    "AdvEncoder",
    "Attack",
    "FeatureUAP",
    "Perturbation",
    "Square",
    "UniversalAttack",
    "frozen",
]
