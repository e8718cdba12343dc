"""Projected gradient descent: one loop for every norm and every loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.base import ATTACKS, Attack, Model, project, random_delta, steepest
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.objective import Objective, Worst, input_gradient


@ATTACKS.register("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """PGD (Madry et al. 2018) with random start and restarts; keeps each sample's worst iterate.

    With a loss on logits a sample leaves the batch as soon as the model it is shown to is wrong about it, which is
    what makes attacking a weak model cheap; a sample that is wrong without any attack is handed back as it came. With
    a loss on features (no labels needed) every sample runs to the end.
    """

    loss: str = "margin"  # of LOGIT_LOSSES or FEATURE_LOSSES
    steps: int = 20  # gradient steps per restart
    step_size: float | None = None  # in pixels; None: 2.5 * epsilon / steps, as Madry et al.
    restarts: int = 1  # the worst over all of them counts
    random_start: bool = True  # False starts the first run at the image itself
    stop_when_wrong: bool = True  # False spends all steps on every sample, for losses that go on past the border

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in FEATURE_LOSSES:
            LOGIT_LOSSES.get(self.loss)
        elif not self.random_start:
            raise ValueError(f"{self.loss} has no gradient at the image itself; write random_start=True")
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"PGD: expected steps and restarts of at least 1, got {self.steps} and {self.restarts}")
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size: expected a positive number or None, got {self.step_size}")

    def run(self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        objective = Objective.make(self.loss, model, images, labels)
        worst = Worst(images)
        if self.stop_when_wrong and not objective.on_features:
            worst.look_at_clean(model, objective)
        for restart in range(self.restarts):
            if len(worst.alive):
                clean = images[worst.alive]
                noise = random_delta(clean, self.epsilon, self.norm, generator)
                start = clean + noise if self.random_start or restart else clean
                self._climb(model, clean, start.clamp(0, 1), objective, worst)
        return worst.images

    def _climb(self, model: Model, clean: Tensor, current: Tensor, objective: Objective, worst: Worst) -> None:
        """One run from ``current`` over the samples alive, noted in ``worst``."""
        for step in range(self.steps + 1):
            looking = step == self.steps  # the last round only looks at the last iterate
            with torch.set_grad_enabled(not looking):
                outputs = model(current.requires_grad_(not looking))
                if step == 0:
                    objective.check(outputs, len(current))
                losses = objective(outputs, worst.alive)
            gradient = torch.zeros_like(current) if looking else input_gradient(losses, current)
            current = current.detach()
            right = objective.still_right(outputs.detach(), worst.alive) if self.stop_when_wrong else None
            keep = worst.record(current, losses, right)
            if looking or len(worst.alive) == 0:
                return
            if right is not None:
                clean, current, gradient = clean[keep], current[keep], gradient[keep]
            moved = current + self._step_size() * steepest(gradient, self.norm)
            current = (clean + project(moved - clean, self.epsilon, self.norm)).clamp(0, 1)

    def _step_size(self) -> float:
        if self.step_size is not None:
            return self.step_size
        return min(self.epsilon, 2.5 * self.epsilon / self.steps)
