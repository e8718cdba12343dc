"""Settings of the training of a feature gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zepad_mm.attacks import ATTACKS, FEATURE_LOSSES, LOGIT_LOSSES, UNIVERSAL_ATTACKS
from zepad_mm.data.corruptions import CORRUPTIONS
from zepad_mm.utils.config import Config
from zepad_mm.utils.text import quoted
from zepad_mm.utils.validation import check_epsilon

CROP = "crop_flip"  # a random crop, flipped with probability 1/2
DOWNSCALE = "downscale"  # to fewer pixels and back

# settings that change no example, and may differ when a run is resumed
UNIDENTIFYING = ("encode_batch_size", "robust_scale", "worst_gating_rate")


@dataclass(frozen=True, kw_only=True)
class GateSettings(Config):
    """Settings of :func:`zepad_mm.training.train_gate`. The defaults take minutes on a CPU; budgets are in pixels."""

    kind: Literal["learned", "cosine"] = "learned"  # "cosine": nothing is trained, the distance is calibrated
    hidden: int = 128  # units of the gate's hidden layer
    dropout: float = 0.2
    n: int | None = 1500  # images drawn from all sources by the seed; None: all. Calibration sources are not counted
    validation_share: float = 0.1  # of the images of each source: they select the weights and measure false alarms
    calibration_share: float = 0.15  # of the images of each source: they set thresholds and nothing else
    # clean examples
    corruptions: tuple[str, ...] = (*CORRUPTIONS, CROP, DOWNSCALE)
    corrupted_views: int = 2  # corrupted copies of each image
    # one perturbation for all images
    universal: tuple[str, ...] = ("feature_uap", "adv_encoder", "fff", "l4a_base", "uapgd", "adv_encoder_patch")
    held_out: str | None = "ssp"  # a universal attack whose examples only select the weights; None: none
    universal_steps: int | None = None  # of each attack; None: its own
    universal_batch_size: int = 16  # images per step of each attack
    universal_images: int = 512  # at most as many are crafted on, from half of the training images
    universal_budgets: tuple[float, ...] = (4 / 255, 12 / 255)  # lowest and highest, L-inf
    universal_views: int = 2  # attacked copies of each image
    # one perturbation for each image, made on the public encoder
    per_image: tuple[str, ...] = ("pgd:feature_l2", "pgd:margin", "apgd:margin")  # ATTACK:LOSS
    per_image_n: int = 800
    per_image_steps: int = 8
    per_image_budgets: tuple[float, ...] = (1 / 255, 12 / 255)
    stopped_n: int = 400  # images attacked on a margin by PGD that stops at the first wrong answer: the smallest change
    # attacks that also keep the gate's own score low, on other images in each round
    rounds: int = 3
    round_n: int = 160
    round_steps: int = 8
    round_budgets: tuple[float, ...] = (1 / 255, 8 / 255)
    least_change: float = 0.03  # 1 - cosine of the public features, below which an attacked image is no example
    attack_batch_size: int = 32
    encode_batch_size: int = 128
    mixed_precision: Literal["no", "bf16"] = "no"  # of crafting; examples are always encoded in full precision
    # the fit
    steps: int = 600  # optimiser steps
    batch_size: int = 256
    lr: float = 2e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    patience: int = 10  # validations without a better one, 25 steps apart, after which the fit ends
    # thresholds
    gating_rate: float = 0.03  # share of clean images whose benign branch may lose more than half of its weight
    worst_gating_rate: float | None = None  # highest such share in any one set; None: only gating_rate, over all sets
    detection_rate: float = 0.05  # share of clean images that may be flagged as adversarial
    robust_scale: float = 0.7  # factor on the robust logits in the fusion, so that they overrule where they are sure
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "hidden", "universal_batch_size", "universal_images", "attack_batch_size", "encode_batch_size", "steps",
            "batch_size", "patience", "per_image_steps", "round_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("corrupted_views", "universal_views", "per_image_n", "stopped_n", "rounds", "round_n"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("validation_share", "calibration_share", "gating_rate", "worst_gating_rate", "detection_rate"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 0.5:
                raise ValueError(f"{name}: expected a share above 0 and below 0.5, got {share}")
        if not self.robust_scale > 0:
            raise ValueError(f"robust_scale: expected a positive number, got {self.robust_scale}")
        self._check_names()
        for name in ("universal_budgets", "per_image_budgets", "round_budgets"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 < check_epsilon(bounds[0]) <= check_epsilon(bounds[1]):
                raise ValueError(
                    f"{name}: expected (lowest, highest) above 0, e.g. (0.016, 0.047), got {quoted(bounds)}"
                )
        if not (self.universal and self.universal_views) and not (self.per_image and self.per_image_n):
            raise ValueError("universal and per_image: expected at least one attack, got none")

    def _check_names(self) -> None:
        for name in self.corruptions:
            if name not in (CROP, DOWNSCALE):
                CORRUPTIONS.get(name)
        for name in (*self.universal, *([self.held_out] if self.held_out else [])):
            UNIVERSAL_ATTACKS.get(name)
        if self.held_out in self.universal:
            raise ValueError(f"held_out: {self.held_out!r} is one of universal, which the gate is trained on")
        for name in self.per_image:
            attack, mark, loss = name.partition(":")
            ATTACKS.get(attack)
            if not mark or (loss not in FEATURE_LOSSES and loss not in LOGIT_LOSSES):
                known = ", ".join([*FEATURE_LOSSES, *LOGIT_LOSSES])
                raise ValueError(f"per_image: expected ATTACK:LOSS with a loss of {known}, got {name!r}")
