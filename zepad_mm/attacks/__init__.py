"""Per-sample attacks on any callable from images to outputs, and universal attacks on encoders."""

from zepad_mm.attacks.adaptive import ADAPTIVE_ATTACKS, FUSED_LOSSES, FusedAttack, SuperclassAttack
from zepad_mm.attacks.apgd import APGD
from zepad_mm.attacks.base import ATTACKS, Attack, frozen
from zepad_mm.attacks.curve import Curve, curve
from zepad_mm.attacks.detector_aware import MODES, DetectorAware
from zepad_mm.attacks.io import (
    AdversarialImages,
    load_adversarial,
    load_published,
    published_variants,
    save_adversarial,
)
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.perturbation import Perturbation
from zepad_mm.attacks.pgd import PGD, MomentumPGD
from zepad_mm.attacks.rays import RayS
from zepad_mm.attacks.square import Square
from zepad_mm.attacks.transfer import DiverseInput, MomentumIterative, TranslationInvariant
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
from zepad_mm.attacks.wrappers import bpda, eot

__all__ = [
    "ADAPTIVE_ATTACKS",
    "APGD",
    "ATTACKS",
    "ETU",
    "FEATURE_LOSSES",
    "FFF",
    "FUSED_LOSSES",
    "L4AUGS",
    "LOGIT_LOSSES",
    "MODES",
    "PGD",
    "SSP",
    "UAP",
    "UAPGD",
    "UNIVERSAL_ATTACKS",
    "AdvCLIP",
    "AdvEncoder",
    "AdvEncoderPatch",
    "AdversarialImages",
    "Attack",
    "Curve",
    "DetectorAware",
    "DiverseInput",
    "FeatureUAP",
    "FusedAttack",
    "L4ABase",
    "L4AFuse",
    "MomentumIterative",
    "MomentumPGD",
    "Perturbation",
    "RayS",
    "Square",
    "SuperclassAttack",
    "TranslationInvariant",
    "UniversalAttack",
    "XTransfer",
    "bpda",
    "curve",
    "eot",
    "frozen",
    "load_adversarial",
    "load_published",
    "published_variants",
    "save_adversarial",
]
