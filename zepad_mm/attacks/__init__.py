"""Attacks: per-sample ones on any callable, universal ones on encoders. They never import models."""

from zepad_mm.attacks.apgd import APGD
from zepad_mm.attacks.base import ATTACKS, Attack, frozen
from zepad_mm.attacks.gradient import PGD
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.perturbation import Perturbation
from zepad_mm.attacks.published import load_published
from zepad_mm.attacks.square import Square
from zepad_mm.attacks.universal import (
    ETU,
    FFF,
    L4AUGS,
    SSP,
    UAP,
    UAPGD,
    UNIVERSAL_ATTACKS,
    AdvCLIP,
    AdvEncoder,
    AdvEncoderPatch,
    FeatureUAP,
    L4ABase,
    L4AFuse,
    UniversalAttack,
    XTransfer,
)

__all__ = [
    "APGD",
    "ATTACKS",
    "ETU",
    "FEATURE_LOSSES",
    "FFF",
    "L4AUGS",
    "LOGIT_LOSSES",
    "PGD",
    "SSP",
    "UAP",
    "UAPGD",
    "UNIVERSAL_ATTACKS",
    "AdvCLIP",
    "AdvEncoder",
    "AdvEncoderPatch",
    "Attack",
    "FeatureUAP",
    "L4ABase",
    "L4AFuse",
    "Perturbation",
    "Square",
    "UniversalAttack",
    "XTransfer",
    "frozen",
    "load_published",
]
