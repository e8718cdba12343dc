"""Downstream-agnostic attacks: one perturbation for every image, made from an encoder and unlabelled pictures."""

from zepad_mm.attacks.universal.adv_encoder import AdvEncoder
from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, Surrogate, UniversalAttack
from zepad_mm.attacks.universal.feature_uap import FeatureUAP

__all__ = ["UNIVERSAL_ATTACKS", "AdvEncoder", "FeatureUAP", "Surrogate", "UniversalAttack"]
