"""Objectives of per-sample attacks, the best adversarial image of each sample, and the loop over restarts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zepad_mm.attacks.base import Attack, Model, random_delta
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES, margin_per_branch, targeted
from zepad_mm.utils.validation import check_labels

# A prediction counts as wrong once its margin is this share of the largest logit: smaller margins may flip back when
# the image is scored again in another batch, whose sums are taken in another order.
CLEARLY_WRONG = 1e-5

# (outputs, labels (b,)) -> the value that iterates are compared by (b,), and whether each sample is still correct (b,)
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """A loss and its targets.

    Attributes:
        loss: (outputs, target) -> (B,), higher is worse for the defender.
        target: true classes (B,), or clean features (..., B, D).
        on_features: whether the target is features.
        rivals: (B,) target classes; if given, the targeted loss replaces ``loss``.
        judge: criterion of success where it is not a wrong prediction of the outputs themselves.
        second: another loss, maximised once the first is positive; each loss steps orthogonally to the other's gradient
            (orthogonal projected gradient descent, Bryniarski et al. 2021).
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    target: Tensor
    on_features: bool
    rivals: Tensor | None = None
    judge: Judge | None = None
    second: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def make(cls, name: str, model: Model, images: Tensor, labels: Tensor | None) -> Objective:
        """The loss called ``name`` for these images. Raises ValueError for an unknown name or missing labels."""
        if name not in FEATURE_LOSSES:
            return cls(LOGIT_LOSSES.get(name), check_labels(labels, images), False)
        with torch.no_grad():
            return cls(FEATURE_LOSSES.get(name), model(images), True)

    def __call__(self, outputs: Tensor, index: Tensor) -> Tensor:
        """Losses (b,) of the samples at ``index`` with these ``outputs``, summed over branches."""
        target = self._target(index)
        losses = self.loss(outputs, target) if self.rivals is None else targeted(outputs, target, self.rivals[index])
        return losses.flatten(0, -2).sum(0) if losses.ndim > 1 else losses

    def untargeted(self, outputs: Tensor, index: Tensor) -> Tensor:
        """The value that iterates are compared by, (b,): the judge's, or the untargeted loss."""
        if self.judge is not None:
            return self.judge(outputs, self._target(index))[0]
        return replace(self, rivals=None)(outputs, index)

    def still_correct(self, outputs: Tensor, index: Tensor) -> Tensor | None:
        """(b,) bool: whether any branch still predicts the label; None for losses on features."""
        if self.on_features:
            return None
        if self.judge is not None:
            return self.judge(outputs, self._target(index))[1]
        right = not_clearly_wrong(outputs, self._target(index))
        return right if right.ndim == 1 else right.flatten(0, -2).any(0)

    def gradient(self, losses: Tensor, outputs: Tensor, index: Tensor, current: Tensor) -> Tensor:
        """The step direction, shaped like ``current``; ``losses`` are those of ``outputs``."""
        if self.second is None:
            return input_gradient(losses, current)
        first = input_gradient(losses, current, keep_graph=True)
        other = input_gradient(self.second(outputs, self._target(index)), current)
        gained = (losses > 0)[:, None, None, None]
        return torch.where(gained, _orthogonal_part(other, first), _orthogonal_part(first, other))

    def check(self, outputs: Tensor, samples: int, classes: bool = True) -> None:
        """Raise ValueError when the model's outputs do not fit the samples or, with ``classes``, their labels."""
        if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[-2] != samples:
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"model: expected outputs of shape ({samples}, C) for {samples} images, got {got}")
        if self.on_features or not classes:
            return
        width, largest = outputs.shape[-1], int(self.target.max())
        if width < 2:
            raise ValueError(f"model: expected logits of at least 2 classes, got {width}")
        if largest >= width:
            raise ValueError(f"labels: expected classes below {width}, the number of logits, got {largest}")

    def _target(self, index: Tensor) -> Tensor:
        return self.target.index_select(-2, index) if self.on_features else self.target[index]


def not_clearly_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., B) bool: whether the prediction is right, or wrong by so little that it may flip back; true for NaN."""
    return ~(margin_per_branch(logits, labels) > CLEARLY_WRONG * logits.abs().amax(-1))


class BestAdversarial:
    """The best adversarial image of each sample so far, and the samples still under attack.

    Attributes:
        images: (B, 3, H, W).
        losses: (B,), of those images.
        active: (b,) indices of the samples that are still correct.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.losses = torch.full((len(images),), -torch.inf, device=images.device)
        self.active = torch.arange(len(images), device=images.device)

    def update_from_clean(self, model: Model, objective: Objective, stop_when_wrong: bool = True) -> Tensor:
        """Outputs on the clean images; samples that are wrong without an attack become inactive at once."""
        with torch.no_grad():
            outputs = model(self.images)
        objective.check(outputs, len(self.images))
        self.update(self.images, outputs, objective, stop_when_wrong)
        return outputs

    def update(self, current: Tensor, outputs: Tensor, objective: Objective, stop_when_wrong: bool = True) -> Tensor:
        """Update from iterates of the active samples and their outputs; returns the mask (b,) that stays active."""
        outputs = outputs.detach()
        right = objective.still_correct(outputs, self.active) if stop_when_wrong else None
        return self.record(current, objective.untargeted(outputs, self.active), right)

    def record(self, current: Tensor, losses: Tensor, right: Tensor | None) -> Tensor:
        """Update from iterates of the active samples; returns the mask (b,) of those that stay active.

        Args:
            current: (b, 3, H, W).
            losses: (b,); the image with the higher loss is kept.
            right: (b,) whether still correct; the others keep this image, whatever its loss, and become inactive.
                None: all stay active.
        """
        losses = losses.detach().to(self.losses.dtype)
        keep = torch.ones_like(self.active, dtype=torch.bool) if right is None else right
        take = (losses > self.losses[self.active]) | ~keep
        self.images[self.active[take]] = current.detach()[take]
        self.losses[self.active[take]] = losses[take]
        self.active = self.active[keep]
        return keep


class RestartAttack(Attack):
    """A gradient attack that maximises each of several objectives from several starts.

    Sub-classes declare the field ``restarts`` and implement one run in ``_run_restart``.
    """

    restarts: int

    def ascend(
        self,
        model: Model,
        images: Tensor,
        objectives: Sequence[Objective],
        best: BestAdversarial,
        generator: torch.Generator,
        start: Tensor | None = None,
    ) -> None:
        """Run every restart of every objective on the active samples of ``best``, which is updated."""
        for restart in range(self.restarts):
            for objective in objectives:
                if len(best.active) == 0:
                    return
                clean = images[best.active]
                if start is not None and restart == 0:
                    begin = start[best.active]
                elif self._random_start(restart):
                    begin = clean + random_delta(clean, self.epsilon, self.norm, generator)
                else:
                    begin = clean
                self._run_restart(model, clean, begin.clamp(0, 1), objective, best, generator)

    def _random_start(self, restart: int) -> bool:
        """Whether a restart without a given start begins at random rather than at the image."""
        return True

    @abstractmethod
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


def input_gradient(losses: Tensor, current: Tensor, keep_graph: bool = False) -> Tensor:
    """Gradient of each sample's loss with respect to its image, without touching ``.grad``.

    Zero where it is NaN, and where the model blocks it: gradient masking is for gradient-free attacks and for the
    diagnostics of the evaluation to find, not a reason to fail.
    """
    if not losses.requires_grad:
        return torch.zeros_like(current)
    (gradient,) = torch.autograd.grad(losses.sum(), current, retain_graph=keep_graph, allow_unused=True)
    return torch.zeros_like(current) if gradient is None else gradient.nan_to_num(0.0)


def _orthogonal_part(gradient: Tensor, other: Tensor) -> Tensor:
    """The part of ``gradient`` orthogonal to ``other``, per sample; both (b, 3, H, W)."""
    along = other / other.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
    return gradient - (gradient * along).flatten(1).sum(1)[:, None, None, None] * along


def strongest_rivals(outputs: Tensor, labels: Tensor, count: int) -> Tensor:
    """(B, min(count, C - 1)): the most probable wrong classes of each sample, by mean log-probability over branches."""
    scores = outputs.log_softmax(-1)
    scores = scores.flatten(0, -3).mean(0) if scores.ndim > 2 else scores
    scores = scores.scatter(-1, labels[:, None], -torch.inf)
    return scores.topk(min(count, outputs.shape[-1] - 1), dim=-1).indices
