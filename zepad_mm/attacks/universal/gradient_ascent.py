"""Signed gradient steps on one delta: how most universal attacks move, whatever they maximise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.base import project, random_delta, steepest
from zepad_mm.attacks.universal.base import Surrogate, UniversalAttack


@dataclass(frozen=True, kw_only=True)
class SignAscent(UniversalAttack):
    """Momentum-sign ascent. The step shrinks along a cosine to a tenth.

    The start is random: at the clean features every feature loss is flat.
    """

    step_size: float = 0.1  # first step as a part of epsilon
    momentum: float = 0.9  # of gradients scaled to mean magnitude 1; 0 is plain sign ascent

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step_size > 0 or not 0 <= self.momentum < 1:
            raise ValueError(f"expected step_size > 0 and momentum in [0, 1), got {self.step_size} and {self.momentum}")

    def ascend(
        self, surrogate: Surrogate, generator: torch.Generator, objective: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The delta (3, image_size, image_size) that makes ``objective(delta, batch)``, a scalar, large."""
        like = surrogate.images.new_empty(1, 3, self.image_size, self.image_size)
        delta = random_delta(like, self.epsilon, self.norm, generator)[0]
        velocity = torch.zeros_like(delta)
        for batch in surrogate:
            delta.requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(delta, batch), delta)
            gradient = gradient.nan_to_num(0.0)
            velocity = self.momentum * velocity + gradient / gradient.abs().mean().clamp_min(1e-20)
            size = self.step_size * self.epsilon * (0.55 + 0.45 * math.cos(math.pi * surrogate.done))
            moved = delta.detach() + size * steepest(velocity[None], self.norm)[0]
            delta = project(moved, self.epsilon, self.norm)
        return delta
