"""Universal (downstream-agnostic) attacks: one perturbation for all images, crafted without labels."""

from zepad_mm.attacks.universal.adv_clip import AdvCLIP
from zepad_mm.attacks.universal.adv_encoder import AdvEncoder, AdvEncoderPatch
from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, Surrogate, UniversalAttack
from zepad_mm.attacks.universal.etu import ETU
from zepad_mm.attacks.universal.feature_uap import FeatureUAP
from zepad_mm.attacks.universal.fff import FFF
from zepad_mm.attacks.universal.l4a import L4AUGS, L4ABase, L4AFuse
from zepad_mm.attacks.universal.ssp import SSP
from zepad_mm.attacks.universal.uap import UAP
from zepad_mm.attacks.universal.uapgd import UAPGD
from zepad_mm.attacks.universal.x_transfer import XTransfer

__all__ = [
    "ETU",
    "FFF",
    "L4AUGS",
    "SSP",
    "UAP",
    "UAPGD",
    "UNIVERSAL_ATTACKS",
    "AdvCLIP",
    "AdvEncoder",
    "AdvEncoderPatch",
    "FeatureUAP",
    "L4ABase",
    "L4AFuse",
    "Surrogate",
    "UniversalAttack",
    "XTransfer",
]
