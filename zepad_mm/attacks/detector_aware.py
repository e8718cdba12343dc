"""Attacks on a defence that flags inputs: success is a wrong answer that is not flagged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zepad_mm.attacks.adaptive import ADAPTIVE_ATTACKS, BranchedAttack
from zepad_mm.attacks.losses import margin
from zepad_mm.attacks.objective import CLEARLY_WRONG, Objective
from zepad_mm.utils.registry import Registry

# name -> what one run of it climbs
MODES: Registry[Callable[[DetectorAware, Tensor], list[Objective]]] = Registry("way around a detector")


@ADAPTIVE_ATTACKS.register("detector_aware")
@dataclass(frozen=True, kw_only=True)
class DetectorAware(BranchedAttack):
    """Drives the fused answer wrong and the detector's score below its threshold.

    The image kept is the one with the largest of the smaller of two gains: the margin of the fused answer and the
    distance below the threshold, the latter in units of ``spread``.
    """

    score: Callable[[Tensor], Tensor] = field(repr=False)  # (N, B, C) to suspicion (B,), higher is flagged
    threshold: float  # what exceeds it is flagged
    driver: str = "pgd"  # Auto-PGD judges its step by a loss, and these switch between two
    mode: str = "selective"  # of MODES
    spread: float = 1.0  # unit of the score: its standard deviation on clean images
    multipliers: tuple[float, ...] = (0.3, 3.0)  # of the score in the joint loss: a run for each

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
        """Margin of the fused answer, and distance below the threshold in spreads: (b,) each, positive when won."""
        below = (self.threshold - self.score(branch_logits)) / self.spread
        return margin(self.fuse(branch_logits).logits, labels), below


@MODES.register("lagrangian")
def lagrangian(attack: DetectorAware, labels: Tensor) -> list[Objective]:
    """Margin less a multiple of what the score exceeds the threshold by (Carlini and Wagner 2017)."""

    def joint(multiplier: float) -> Objective:
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            wrong, below = attack.gains(logits, labels)
            return wrong + multiplier * below.clamp_max(0)

        return Objective(loss, labels, False, judge=attack.judge)

    return [joint(multiplier) for multiplier in attack.multipliers]


@MODES.register("selective")
def selective(attack: DetectorAware, labels: Tensor) -> list[Objective]:
    """One loss at a time: the answer until it is wrong, then the score (Bryniarski et al. 2021, section 4.1)."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        wrong, below = attack.gains(logits, labels)
        return torch.where(wrong > 0, below, wrong)

    return [Objective(loss, labels, False, judge=attack.judge)]


@MODES.register("weakest")
def weakest(attack: DetectorAware, labels: Tensor) -> list[Objective]:
    """The smaller of the two gains: climbs whichever lags behind."""
    return [Objective(lambda logits, y: attack.judge(logits, y)[0], labels, False, judge=attack.judge)]


@MODES.register("orthogonal")
def orthogonal(attack: DetectorAware, labels: Tensor) -> list[Objective]:
    """As selective, each gradient less its part along the other one (Bryniarski et al. 2021, section 4.2)."""
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
    """The score alone, downwards; for images handed in as ``start`` that are wrong already and flagged."""
    return [Objective(lambda logits, y: attack.gains(logits, y)[1], labels, False, judge=attack.judge)]
