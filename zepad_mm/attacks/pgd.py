"""Projected gradient descent (PGD) for every norm and loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.base import ATTACKS, Model, steepest
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.objective import BestAdversarial, Objective, RestartAttack


@ATTACKS.register("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(RestartAttack):
    """PGD (Madry et al. 2018) with random start and restarts; keeps each sample's worst iterate.

    With a loss on logits a sample leaves the batch as soon as the model is wrong about it, which makes attacking a
    weak model cheap; a sample that is wrong without an attack is returned unchanged. With a loss on features (no labels
    needed) every sample runs all steps.
    """

    loss: str = "margin"  # of LOGIT_LOSSES or FEATURE_LOSSES
    steps: int = 20  # gradient steps per restart
    step_size: float | None = None  # in pixels; None: 2.5 * epsilon / steps, as Madry et al.
    restarts: int = 1  # the worst over all of them counts
    random_start: bool = True  # False: the first restart starts at the image itself
    momentum: float = 0.0  # share of a step that repeats the last displacement, as Auto-PGD's 0.25; in [0, 1)
    decay: bool = False  # True: the step size falls linearly to zero
    stop_when_wrong: bool = True  # False: every sample runs all steps, for losses that go on beyond it

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
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a share in [0, 1), e.g. 0.25, got {self.momentum}")

    def run(
        self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        objective = Objective.make(self.loss, model, images, labels)
        best = BestAdversarial(images)
        if self.stop_when_wrong and not objective.on_features:
            best.update_from_clean(model, objective)
        self.ascend(model, images, [objective], best, generator, start)
        return best.images

    def _random_start(self, restart: int) -> bool:
        return self.random_start or restart > 0

    def _run_restart(
        self,
        model: Model,
        clean: Tensor,
        start: Tensor,
        objective: Objective,
        best: BestAdversarial,
        generator: torch.Generator,
    ) -> None:
        """Run one restart from ``start`` on the active samples of ``best``, which is updated."""
        current = previous = start
        for step in range(self.steps + 1):
            last = step == self.steps  # the last iterate is scored without another step
            with torch.set_grad_enabled(not last):
                outputs = model(current.requires_grad_(not last))
                if step == 0:
                    objective.check(outputs, len(current))
                losses = objective(outputs, best.active)
            gradient = current if last else objective.gradient(losses, outputs, best.active, current)
            current = current.detach()
            keep = best.update(current, outputs, objective, self.stop_when_wrong)
            if last or len(best.active) == 0:
                return
            if not bool(keep.all()):
                clean, current, previous, gradient = clean[keep], current[keep], previous[keep], gradient[keep]
            moved = self.clip_to_budget(clean, current + self._step_size(step) * steepest(gradient, self.norm))
            if self.momentum and step > 0:
                moved = current + (1 - self.momentum) * (moved - current) + self.momentum * (current - previous)
                moved = self.clip_to_budget(clean, moved)
            current, previous = moved, current

    def _step_size(self, step: int) -> float:
        """The size of a step, in pixels."""
        size = self._first_step_size() if self.step_size is None else self.step_size
        return size * (1 - step / self.steps) if self.decay else size

    def _first_step_size(self) -> float:
        return min(self.epsilon, 2.5 * self.epsilon / self.steps)


@ATTACKS.register("pgd_momentum")
@dataclass(frozen=True, kw_only=True)
class MomentumPGD(PGD):
    """PGD that starts with steps of twice the budget, which fall linearly to zero, with Auto-PGD's momentum.

    The optimiser of MORA (Yu et al. 2022). Against a fused model it needs fewer steps than Auto-PGD.
    """

    momentum: float = 0.25
    decay: bool = True

    def _first_step_size(self) -> float:
        return 2 * self.epsilon
