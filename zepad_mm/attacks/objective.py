"""What a per-sample attack drives up, and the record of the worst image found for each sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zepad_mm.attacks.base import Model
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES, margin_per_branch, targeted
from zepad_mm.utils.validation import check_labels

# An answer counts as wrong once the margin is this part of the largest logit: thinner ones flip back when the image
# is scored again in another batch, where sums are taken in another order.
CLEARLY_WRONG = 1e-5

# (outputs, labels (b,)) -> what iterates are compared by (b,), and for which samples the defence still stands (b,)
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """A loss and what it compares with.

    Attributes:
        loss: (outputs, target) -> (B,), higher is worse for the defender.
        target: true classes (B,), or clean features (..., B, D).
        on_features: which of the two.
        rivals: (B,) wrong classes to drive towards; then the targeted loss takes the place of ``loss``.
        judge: what counts as success where that is not a wrong answer of the outputs themselves.
        second: another loss whose gradient the steps must not disturb, and which they climb once the first is positive
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
        """Losses of the samples at ``index``, whose outputs are given: (b,), summed over branches."""
        target = self._target(index)
        losses = self.loss(outputs, target) if self.rivals is None else targeted(outputs, target, self.rivals[index])
        return losses.flatten(0, -2).sum(0) if losses.ndim > 1 else losses

    def untargeted(self, outputs: Tensor, index: Tensor) -> Tensor:
        """What iterates are compared by, (b,): the judge's value, or the loss without the rivals."""
        if self.judge is not None:
            return self.judge(outputs, self._target(index))[0]
        return replace(self, rivals=None)(outputs, index)

    def still_correct(self, outputs: Tensor, index: Tensor) -> Tensor | None:
        """(b,): does any branch still answer right? None for losses on features, which do not know."""
        if self.on_features:
            return None
        if self.judge is not None:
            return self.judge(outputs, self._target(index))[1]
        right = not_clearly_wrong(outputs, self._target(index))
        return right if right.ndim == 1 else right.flatten(0, -2).any(0)

    def gradient(self, losses: Tensor, outputs: Tensor, index: Tensor, current: Tensor) -> Tensor:
        """The direction to step in, like ``current``; ``losses`` are of these ``outputs``."""
        if self.second is None:
            return input_gradient(losses, current)
        first = input_gradient(losses, current, keep_graph=True)
        other = input_gradient(self.second(outputs, self._target(index)), current)
        gained = (losses > 0)[:, None, None, None]
        return torch.where(gained, _without(other, first), _without(first, other))

    def check(self, outputs: Tensor, samples: int, classes: bool = True) -> None:
        """Raises ValueError when the model's outputs do not fit the samples or, with ``classes``, their labels."""
        if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[-2] != samples:
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"model: expected outputs of shape ({samples}, C) for {samples} images, got {got}")
        if self.on_features or not classes:
            return
        width, largest = outputs.shape[-1], int(self.target.max())
        if width < 2:
            raise ValueError(f"model: expected logits of at least 2 classes, got {width}")
        if largest >= width:
            raise ValueError(f"labels: expected classes below {width}, as the model puts out, got {largest}")

    def _target(self, index: Tensor) -> Tensor:
        return self.target.index_select(-2, index) if self.on_features else self.target[index]


def not_clearly_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., B): is the answer right, or wrong by so little that it may flip back? NaN is no success."""
    return ~(margin_per_branch(logits, labels) > CLEARLY_WRONG * logits.abs().amax(-1))


class BestAdversarial:
    """The worst image of each sample so far, and the samples still worth attacking.

    Attributes:
        images: (B, 3, H, W).
        losses: (B,), of those images.
        alive: (b,) indices of the samples not yet beaten.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.losses = torch.full((len(images),), -torch.inf, device=images.device)
        self.active = torch.arange(len(images), device=images.device)

    def update_from_clean(self, model: Model, objective: Objective, stop_when_wrong: bool = True) -> Tensor:
        """Outputs at the images as they are; samples that are wrong without an attack leave at once."""
        with torch.no_grad():
            outputs = model(self.images)
        objective.check(outputs, len(self.images))
        self.update(self.images, outputs, objective, stop_when_wrong)
        return outputs

    def update(self, current: Tensor, outputs: Tensor, objective: Objective, stop_when_wrong: bool = True) -> Tensor:
        """Take note of iterates whose outputs are given; returns the mask (b,) of those that stay alive."""
        outputs = outputs.detach()
        right = objective.still_correct(outputs, self.active) if stop_when_wrong else None
        return self.record(current, objective.untargeted(outputs, self.active), right)

    def record(self, current: Tensor, losses: Tensor, right: Tensor | None) -> Tensor:
        """Take note of iterates of the samples alive; returns the mask (b,) of those that stay alive.

        Args:
            current: (b, 3, H, W).
            losses: (b,); the higher one is kept.
            right: (b,) still answered right; the others leave with this image, whatever their loss. None: all stay.
        """
        losses = losses.detach().to(self.losses.dtype)
        keep = torch.ones_like(self.active, dtype=torch.bool) if right is None else right
        take = (losses > self.losses[self.active]) | ~keep
        self.images[self.active[take]] = current.detach()[take]
        self.losses[self.active[take]] = losses[take]
        self.active = self.active[keep]
        return keep


def input_gradient(losses: Tensor, current: Tensor, keep_graph: bool = False) -> Tensor:
    """Gradient of each sample's loss with respect to its image, without touching ``.grad``.

    Zero where it is NaN, and where the model cuts it off: such a model is for attacks without gradients, and for the
    evaluation's doubts, not a reason to stop.
    """
    if not losses.requires_grad:
        return torch.zeros_like(current)
    (gradient,) = torch.autograd.grad(losses.sum(), current, retain_graph=keep_graph, allow_unused=True)
    return torch.zeros_like(current) if gradient is None else gradient.nan_to_num(0.0)


def _without(gradient: Tensor, other: Tensor) -> Tensor:
    """``gradient`` less its part along ``other``, per sample; both (b, 3, H, W)."""
    along = other / other.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
    return gradient - (gradient * along).flatten(1).sum(1)[:, None, None, None] * along


def strongest_rivals(outputs: Tensor, labels: Tensor, count: int) -> Tensor:
    """(B, min(count, C - 1)): the likeliest wrong classes of each sample, by mean log-probability over branches."""
    scores = outputs.log_softmax(-1)
    scores = scores.flatten(0, -3).mean(0) if scores.ndim > 2 else scores
    scores = scores.scatter(-1, labels[:, None], -torch.inf)
    return scores.topk(min(count, outputs.shape[-1] - 1), dim=-1).indices
