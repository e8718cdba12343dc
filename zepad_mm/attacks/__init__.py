"""Attacks: per-sample ones on any callable, universal ones on encoders. They never import models."""

from zepad_mm.attacks.adaptive import ADAPTIVE_ATTACKS, FUSED_LOSSES, FusedAttack
from zepad_mm.attacks.apgd import APGD
from zepad_mm.attacks.base import ATTACKS, Attack, frozen
from zepad_mm.attacks.curve import Curve, curve
from zepad_mm.attacks.detector_aware import MODES, DetectorAware
from zepad_mm.attacks.gradient import PGD
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.perturbation import Perturbation
from zepad_mm.attacks.saved import Attacked, load_attacked, save_attacked
from zepad_mm.attacks.square import Square
from zepad_mm.attacks.universal import UNIVERSAL_ATTACKS, AdvEncoder, FeatureUAP, UniversalAttack
from zepad_mm.attacks.wrappers import bpda, eot

__all__ = [
    "ADAPTIVE_ATTACKS",
    "APGD",
    "ATTACKS",
    "FEATURE_LOSSES",
    "FUSED_LOSSES",
    "LOGIT_LOSSES",
    "MODES",
    "PGD",
    "UNIVERSAL_ATTACKS",
    "AdvEncoder",
    "Attack",
    "Attacked",
    "Curve",
    "DetectorAware",
    "FeatureUAP",
    "FusedAttack",
    "Perturbation",
    "Square",
    "UniversalAttack",
    "bpda",
    "curve",
    "eot",
    "frozen",
    "load_attacked",
    "save_attacked",
]
