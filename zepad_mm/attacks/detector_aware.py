"""Attacks on a model with a detector: success is a wrong prediction that is not flagged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zepad_mm.attacks.adaptive import ADAPTIVE_ATTACKS, BranchedAttack
from zepad_mm.attacks.losses import margin
from zepad_mm.attacks.objective import CLEARLY_WRONG, Objective
from zepad_mm.utils.registry import Registry

# name -> objectives(attack, labels), one run each
MODES: Registry[Callable[[DetectorAware, Tensor], list[Objective]]] = Registry("detector-aware mode")


@ADAPTIVE_ATTACKS.register("detector_aware")
@dataclass(frozen=True, kw_only=True)
class DetectorAware(BranchedAttack):
    """Makes the fused prediction wrong and keeps the detector's score below its threshold.

    Images are compared by the smaller of two values: the margin of the fused logits, and the distance of the score
    below the threshold in units of ``spread``.
    """

    score: Callable[[Tensor], Tensor] = field(repr=False)  # branch logits (N, B, C) to suspicion scores (B,)
    threshold: float  # inputs with a higher score are flagged
    driver: str = "pgd"  # Auto-PGD adapts its step to one loss, and some modes switch between two
    mode: str = "selective"  # of MODES
    spread: float = 1.0  # standard deviation of the score on clean images
    multipliers: tuple[float, ...] = (0.3, 3.0)  # weights of the score in the joint loss, one run each

    def __post_init__(self) -> None:
        super().__post_init__()
        MODES.get(self.mode)
        if not callable(self.score):
            raise ValueError(f"score: expected a callable on branch logits (N, B, C), got {self.score!r}")
        if not self.spread > 0 or not self.multipliers or min(self.multipliers) <= 0:
            raise ValueError(
                "detector: expected a positive spread and at least one positive multiplier, "
                f"got {self.spread} and {self.multipliers}"
            )

    def objectives(self, labels: Tensor, branches: int) -> list[Objective]:
        return MODES.get(self.mode)(self, labels)

    def judge(self, branch_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        _, right = super().judge(branch_logits, labels)
        wrong, below = self.gains(branch_logits, labels)
        return torch.minimum(wrong, below), right | ~(below > CLEARLY_WRONG)

    def gains(self, branch_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Margin of the fused logits, and distance below the threshold in spreads: (b,) each, positive on success."""
        below = (self.threshold - self.score(branch_logits)) / self.spread
        return margin(self.fuse(branch_logits).logits, labels), below


@MODES.register("lagrangian")
def lagrangian(attack: DetectorAware, labels: Tensor) -> list[Objective]:
    """Margin minus a multiple of the score's excess over the threshold (Carlini and Wagner 2017)."""

    def joint(multiplier: float) -> Objective:
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            wrong, below = attack.gains(logits, labels)
            return wrong + multiplier * below.clamp_max(0)

        return Objective(loss, labels, False, judge=attack.judge)

    return [joint(multiplier) for multiplier in attack.multipliers]


@MODES.register("selective")
def selective(attack: DetectorAware, labels: Tensor) -> list[Objective]:
    """The margin until the prediction is wrong, then the score (Bryniarski et al. 2021, section 4.1)."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        wrong, below = attack.gains(logits, labels)
        return torch.where(wrong > 0, below, wrong)

    return [Objective(loss, labels, False, judge=attack.judge)]


@MODES.register("weakest")
def weakest(attack: DetectorAware, labels: Tensor) -> list[Objective]:
    """The smaller of the two gains."""
    return [Objective(lambda logits, y: attack.judge(logits, y)[0], labels, False, judge=attack.judge)]


@MODES.register("orthogonal")
def orthogonal(attack: DetectorAware, labels: Tensor) -> list[Objective]:
    """As selective, with each gradient orthogonal to the other (Bryniarski et al. 2021, section 4.2)."""
    return [
        Objective(
            lambda logits, y: attack.gains(logits, y)[0],
            labels,
            False,
            judge=attack.judge,
            second=lambda logits, y: attack.gains(logits, y)[1],
        )
    ]


@MODES.register("suppress")
def suppress(attack: DetectorAware, labels: Tensor) -> list[Objective]:
    """The score alone; for ``start`` images that are already misclassified but flagged."""
    return [Objective(lambda logits, y: attack.gains(logits, y)[1], labels, False, judge=attack.judge)]
