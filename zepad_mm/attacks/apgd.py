"""Auto-PGD (Croce and Hein 2020): PGD with momentum and a step size that halves when progress stalls."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from zepad_mm.attacks.base import ATTACKS, Model, steepest
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.objective import BestAdversarial, Objective, RestartAttack, strongest_rivals

log = logging.getLogger(__name__)

TARGETED = "targeted"


@ATTACKS.register("apgd")
@dataclass(frozen=True, kw_only=True)
class APGD(RestartAttack):
    """Auto-PGD with random starts; keeps each sample's worst iterate and drops samples once they are wrong.

    ``loss="targeted"`` runs once for each of the strongest wrong classes, with the targeted logit ratio where there are
    at least 4 classes and the plain difference of logits below.
    """

    loss: str = "margin"  # "targeted", or of LOGIT_LOSSES or FEATURE_LOSSES; "dlr" needs 3 classes
    steps: int = 50  # gradient steps per restart and target
    restarts: int = 1  # the worst over all of them counts
    targets: int = 9  # wrong classes tried by "targeted", at most the number of classes less one
    stop_when_wrong: bool = True  # False: every sample runs all steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in FEATURE_LOSSES and self.loss != TARGETED:
            LOGIT_LOSSES.get(self.loss)
        if self.steps < 1 or self.restarts < 1 or self.targets < 1:
            raise ValueError(
                "APGD: expected steps, restarts and targets of at least 1, "
                f"got {self.steps}, {self.restarts} and {self.targets}"
            )

    def run(
        self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        objective = Objective.make("margin" if self.loss == TARGETED else self.loss, model, images, labels)
        best = BestAdversarial(images)
        objectives = [objective]
        if not objective.on_features:
            outputs = best.update_from_clean(model, objective, self.stop_when_wrong)
            if self.loss == TARGETED:
                if outputs.shape[-1] < 4:
                    log.info(
                        "APGD-T: %d classes; the ratio needs 4, the difference of logits is used", outputs.shape[-1]
                    )
                rivals = strongest_rivals(outputs, objective.target, self.targets)
                objectives = [replace(objective, rivals=column) for column in rivals.unbind(-1)]
        self.ascend(model, images, objectives, best, generator, start)
        return best.images

    def _run_restart(
        self,
        model: Model,
        clean: Tensor,
        start: Tensor,
        objective: Objective,
        best: BestAdversarial,
        generator: torch.Generator,
    ) -> None:
        """Run one restart on the active samples: algorithm 1 of the paper, with a step size per sample."""
        loss, gradient, keep = self._forward_backward(model, start, objective, best)
        state = APGDState.initial(clean, start, loss, gradient, 2 * self.epsilon).select(keep)
        checks = checkpoints(self.steps)
        since = 0
        for step in range(1, self.steps + 1):
            if len(best.active) == 0:
                return
            moved = self.clip_to_budget(state.clean, state.current + state.step * steepest(state.gradient, self.norm))
            if step > 1:
                moved = state.current + 0.75 * (moved - state.current) + 0.25 * (state.current - state.previous)
                moved = self.clip_to_budget(state.clean, moved)
            loss, gradient, keep = self._forward_backward(model, moved, objective, best)
            state = state.after_step(moved, loss, gradient).select(keep)
            if step in checks:
                state = state.after_checkpoint(step - since)
                since = step

    def _forward_backward(
        self, model: Model, current: Tensor, objective: Objective, best: BestAdversarial
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (b,), gradients and the mask of samples that stay active, at iterates of the active samples."""
        current = current.detach().requires_grad_(True)
        outputs = model(current)
        objective.check(outputs, len(current), classes=False)
        losses = objective(outputs, best.active)
        gradient = objective.gradient(losses, outputs, best.active, current)
        return losses.detach(), gradient, best.update(current, outputs, objective, self.stop_when_wrong)


def checkpoints(steps: int) -> set[int]:
    """The steps at which progress is checked, as in the released code.

    The first after 22 % of the steps, each further interval 3 % of the steps shorter, at least 6 %, all rounded down.
    With 100 steps these are the paper's; with few steps, rounding makes checks more frequent and the attack stronger.
    """
    wait, least, fewer = (max(int(share * steps + 1e-9), 1) for share in (0.22, 0.06, 0.03))
    at, steps_to_check = wait, set()
    while at <= steps:
        steps_to_check.add(at)
        wait = max(wait - fewer, least)
        at += wait
    return steps_to_check


@dataclass(frozen=True)
class APGDState:
    """The state of one restart; the first axis of every tensor is the sample."""

    clean: Tensor
    current: Tensor
    previous: Tensor
    loss: Tensor
    gradient: Tensor
    step: Tensor  # (b, 1, 1, 1)
    best: Tensor
    best_loss: Tensor
    best_gradient: Tensor
    checked_loss: Tensor  # best loss at the last checkpoint
    increases: Tensor  # steps since then that increased the loss
    halved: Tensor  # whether the step was halved at the last checkpoint

    @classmethod
    def initial(cls, clean: Tensor, start: Tensor, loss: Tensor, gradient: Tensor, step: float) -> APGDState:
        steps = torch.full((len(clean), 1, 1, 1), step, dtype=clean.dtype, device=clean.device)
        increases = torch.zeros(len(clean), dtype=torch.long, device=clean.device)
        return cls(clean, start, start, loss, gradient, steps, start, loss, gradient, loss, increases, increases == 0)

    def select(self, keep: Tensor) -> APGDState:
        """The state of the samples in the mask ``keep``."""
        return self if bool(keep.all()) else APGDState(*(getattr(self, field.name)[keep] for field in fields(self)))

    def after_step(self, current: Tensor, loss: Tensor, gradient: Tensor) -> APGDState:
        """The state after one step."""
        better = loss > self.best_loss
        per_pixel = better[:, None, None, None]
        return replace(
            self,
            previous=self.current,
            current=current,
            loss=loss,
            gradient=gradient,
            best=torch.where(per_pixel, current, self.best),
            best_gradient=torch.where(per_pixel, gradient, self.best_gradient),
            best_loss=torch.where(better, loss, self.best_loss),
            increases=self.increases + (loss > self.loss),
        )

    def after_checkpoint(self, steps: int) -> APGDState:
        """The state after a checkpoint: stalled samples halve their step and continue from their best image."""
        stalled = (self.increases <= 0.75 * steps) | (~self.halved & (self.checked_loss >= self.best_loss))
        per_pixel = stalled[:, None, None, None]
        return replace(
            self,
            step=torch.where(per_pixel, self.step / 2, self.step),
            current=torch.where(per_pixel, self.best, self.current),
            gradient=torch.where(per_pixel, self.best_gradient, self.gradient),
            loss=torch.where(stalled, self.best_loss, self.loss),
            checked_loss=self.best_loss,
            increases=torch.zeros_like(self.increases),
            halved=stalled,
        )
