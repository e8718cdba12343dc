"""Auto-PGD (Croce and Hein 2020): momentum, and a step size that halves where the ascent stalls."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from zepad_mm.attacks.base import ATTACKS, Attack, Model, random_delta, steepest
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.objective import BestAdversarial, Objective, strongest_rivals

log = logging.getLogger(__name__)

TARGETED = "targeted"


@ATTACKS.register("apgd")
@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD with random starts; keeps each sample's worst iterate and drops samples once they are wrong.

    ``loss="targeted"`` runs once for each of the strongest wrong classes, with the targeted logit ratio where there are
    at least 4 classes and the plain difference of logits below.
    """

    loss: str = "margin"  # "targeted", or of LOGIT_LOSSES or FEATURE_LOSSES; "dlr" needs 3 classes
    steps: int = 50  # gradient steps per restart and target
    restarts: int = 1  # the worst over all of them counts
    targets: int = 9  # wrong classes tried by "targeted", at most the number of classes less one
    stop_when_wrong: bool = True  # False spends all steps on every sample

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
                        "APGD-T: %d classes; the ratio needs 4 and is dropped, differences remain", outputs.shape[-1]
                    )
                rivals = strongest_rivals(outputs, objective.target, self.targets)
                objectives = [replace(objective, rivals=column) for column in rivals.unbind(-1)]
        self.ascend(model, images, objectives, best, generator, start)
        return best.images

    def ascend(
        self,
        model: Model,
        images: Tensor,
        objectives: Sequence[Objective],
        best: BestAdversarial,
        generator: torch.Generator,
        start: Tensor | None = None,
    ) -> None:
        """Every restart of every objective over the samples alive, noted in ``worst``."""
        for restart in range(self.restarts):
            for objective in objectives:
                if len(best.active):
                    clean = images[best.active]
                    if start is not None and restart == 0:
                        begin = start[best.active]
                    else:
                        begin = clean + random_delta(clean, self.epsilon, self.norm, generator)
                    self._run_restart(model, clean, begin.clamp(0, 1), objective, best)

    def _run_restart(
        self, model: Model, clean: Tensor, start: Tensor, objective: Objective, best: BestAdversarial
    ) -> None:
        """One run over the samples alive, noted in ``worst``; algorithm 1 of the paper, with a step size per sample."""
        loss, gradient, keep = self._forward_backward(model, start, objective, best)
        walk = APGDState.begin(clean, start, loss, gradient, 2 * self.epsilon).only(keep)
        checks = checkpoints(self.steps)
        since = 0
        for step in range(1, self.steps + 1):
            if len(best.active) == 0:
                return
            moved = self.clip_to_budget(walk.clean, walk.current + walk.step * steepest(walk.gradient, self.norm))
            if step > 1:
                moved = walk.current + 0.75 * (moved - walk.current) + 0.25 * (walk.current - walk.previous)
                moved = self.clip_to_budget(walk.clean, moved)
            loss, gradient, keep = self._forward_backward(model, moved, objective, best)
            walk = walk.moved(moved, loss, gradient).only(keep)
            if step in checks:
                walk = walk.checked(step - since)
                since = step

    def _forward_backward(
        self, model: Model, current: Tensor, objective: Objective, best: BestAdversarial
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (b,), gradients and who stays alive, at iterates of the samples alive."""
        current = current.detach().requires_grad_(True)
        outputs = model(current)
        objective.check(outputs, len(current), classes=False)
        losses = objective(outputs, best.active)
        gradient = objective.gradient(losses, outputs, best.active, current)
        return losses.detach(), gradient, best.update(current, outputs, objective, self.stop_when_wrong)


def checkpoints(steps: int) -> set[int]:
    """The steps at which progress is judged, as in the released code.

    After 22 % of them, then after 3 % fewer each time and at least 6 %, each rounded down to whole steps. With 100
    steps these are the paper's; with few, rounding makes them come sooner, and the attack stronger.
    """
    wait, least, fewer = (max(int(share * steps + 1e-9), 1) for share in (0.22, 0.06, 0.03))
    at, found = wait, set()
    while at <= steps:
        found.add(at)
        wait = max(wait - fewer, least)
        at += wait
    return found


@dataclass(frozen=True)
class APGDState:
    """The state of one run, first axis: sample."""

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
    rises: Tensor  # steps since then that raised the loss
    halved: Tensor  # was the step halved at the last checkpoint?

    @classmethod
    def begin(cls, clean: Tensor, start: Tensor, loss: Tensor, gradient: Tensor, step: float) -> APGDState:
        steps = torch.full((len(clean), 1, 1, 1), step, dtype=clean.dtype, device=clean.device)
        rises = torch.zeros(len(clean), dtype=torch.long, device=clean.device)
        return cls(clean, start, start, loss, gradient, steps, start, loss, gradient, loss, rises, rises == 0)

    def only(self, keep: Tensor) -> APGDState:
        """The samples that stay alive."""
        return self if bool(keep.all()) else APGDState(*(getattr(self, field.name)[keep] for field in fields(self)))

    def moved(self, current: Tensor, loss: Tensor, gradient: Tensor) -> APGDState:
        """After one step."""
        better = loss > self.best_loss
        wide = better[:, None, None, None]
        return replace(
            self,
            previous=self.current,
            current=current,
            loss=loss,
            gradient=gradient,
            best=torch.where(wide, current, self.best),
            best_gradient=torch.where(wide, gradient, self.best_gradient),
            best_loss=torch.where(better, loss, self.best_loss),
            rises=self.rises + (loss > self.loss),
        )

    def checked(self, steps: int) -> APGDState:
        """After a checkpoint: stalled samples halve their step and go on from their best image."""
        stalled = (self.rises <= 0.75 * steps) | (~self.halved & (self.checked_loss >= self.best_loss))
        wide = stalled[:, None, None, None]
        return replace(
            self,
            step=torch.where(wide, self.step / 2, self.step),
            current=torch.where(wide, self.best, self.current),
            gradient=torch.where(wide, self.best_gradient, self.gradient),
            loss=torch.where(stalled, self.best_loss, self.loss),
            checked_loss=self.best_loss,
            rises=torch.zeros_like(self.rises),
            halved=stalled,
        )
