"""Attacks that transfer: made on one model and tried on another, which the attacker cannot differentiate.

Iterative attacks with momentum (Dong et al. 2018) on diverse inputs (Xie et al. 2019) or with translation-invariant
gradients (Dong et al. 2019). For transfer, write ``stop_when_wrong=False``: the strongest image for the model at hand,
not the first that it misclassifies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.base import ATTACKS, Model, steepest
from zepad_mm.attacks.objective import BestAdversarial, Objective
from zepad_mm.attacks.pgd import PGD


@ATTACKS.register("mi")
@dataclass(frozen=True, kw_only=True)
class MomentumIterative(PGD):
    """MI-FGSM: steps along the running sum of gradients, each divided by its mean absolute value."""

    steps: int = 10
    accumulation: float = 1.0  # factor on the running sum at each step
    diversity: float = 0.0  # probability that a step sees the images shrunk and padded at random
    smallest: float = 0.8  # least side of a shrunk image, as a share of its own
    smoothing: bool = False  # whether gradients are smoothed by a Gaussian kernel

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.diversity <= 1 or not 0 < self.smallest <= 1:
            raise ValueError(
                f"diversity and smallest: expected shares in [0, 1], smallest above 0, got {self.diversity} and "
                f"{self.smallest}"
            )

    def _run_restart(
        self,
        model: Model,
        clean: Tensor,
        start: Tensor,
        objective: Objective,
        best: BestAdversarial,
        generator: torch.Generator,
    ) -> None:
        """Run one restart; success is judged on the plain images, whatever the gradients are taken on."""
        current, summed = start, torch.zeros_like(start)
        for step in range(self.steps + 1):
            last = step == self.steps  # the last iterate is scored without another step
            varied = not last and float(torch.rand((), generator=generator)) < self.diversity
            plain = not last and not varied
            index = best.active
            with torch.set_grad_enabled(plain):
                outputs = model(current.requires_grad_(plain))
                if step == 0:
                    objective.check(outputs, len(current))
                losses = objective(outputs, index)
            gradient = objective.gradient(losses, outputs, index, current) if plain else None
            current = current.detach()
            keep = best.update(current, outputs, objective, self.stop_when_wrong)
            if last or len(best.active) == 0:
                return
            if not bool(keep.all()):
                clean, current, summed = clean[keep], current[keep], summed[keep]
                gradient = None if gradient is None else gradient[keep]
            if gradient is None:
                gradient = self._gradient_of_varied(model, current, objective, best.active, generator)
            summed = self.accumulation * summed + self._normalised(gradient)
            current = self.clip_to_budget(clean, current + self._step_size(step) * steepest(summed, self.norm))

    def _gradient_of_varied(
        self, model: Model, current: Tensor, objective: Objective, index: Tensor, generator: torch.Generator
    ) -> Tensor:
        current = current.requires_grad_()
        outputs = model(shrink_and_pad(current, self.smallest, generator))
        gradient = objective.gradient(objective(outputs, index), outputs, index, current)
        current.requires_grad_(False)
        return gradient

    def _normalised(self, gradient: Tensor) -> Tensor:
        if self.smoothing:
            gradient = smooth(gradient)
        return gradient / gradient.abs().flatten(1).mean(1).clamp_min(1e-37)[:, None, None, None]


@ATTACKS.register("di")
@dataclass(frozen=True, kw_only=True)
class DiverseInput(MomentumIterative):
    """MI-FGSM on diverse inputs."""

    diversity: float = 0.7


@ATTACKS.register("ti")
@dataclass(frozen=True, kw_only=True)
class TranslationInvariant(MomentumIterative):
    """MI-FGSM with translation-invariant gradients."""

    smoothing: bool = True


def shrink_and_pad(images: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Images shrunk to a random side of at least ``smallest`` of their own, at a random place among zeros.

    One draw for the batch; same shape; differentiable.
    """
    height, width = images.shape[-2:]
    share = smallest + (1 - smallest) * float(torch.rand((), generator=generator))
    size = max(1, round(share * height)), max(1, round(share * width))
    top, left = (
        int(torch.randint(full - side + 1, (), generator=generator))
        for full, side in zip((height, width), size, strict=True)
    )
    shrunk = F.interpolate(images, size, mode="bilinear", align_corners=False).clamp(0, 1)
    return F.pad(shrunk, (left, width - size[1] - left, top, height - size[0] - top))


def smooth(gradient: Tensor) -> Tensor:
    """Gradients (B, 3, H, W) smoothed by a Gaussian kernel of about a sixteenth of the width, three sigma wide."""
    radius = max(1, gradient.shape[-1] // 32)
    places = torch.arange(-radius, radius + 1, device=gradient.device, dtype=gradient.dtype)
    line = (-0.5 * (places * 3 / radius).square()).exp()
    kernel = (line[:, None] * line / line.sum().square()).expand(gradient.shape[1], 1, -1, -1)
    return F.conv2d(gradient, kernel, padding=radius, groups=gradient.shape[1])
