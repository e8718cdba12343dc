"""Defences that only look robust, over an undefended linear or quadratic classifier that any real attack breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES, SIDE = 4, 16
PATTERNS = torch.randn(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7)).sign()


def make_images(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Faint patterns in noise: the classifier is right on all of them, and 8/255 is enough to break it."""
    labels = torch.arange(n) % CLASSES
    noise = torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 0.02 * PATTERNS[labels] + 0.05 * noise).clamp(0.1, 0.9), labels


def undefended(images: Tensor) -> Tensor:
    """Matched filters."""
    return (images.flatten(1) - 0.5) @ PATTERNS.flatten(1).T / 10


def saturated(images: Tensor) -> Tensor:
    """Logits so large that cross-entropy is exactly flat."""
    return 1e4 * undefended(images)


def detached_branch(images: Tensor) -> Tensor:
    """A fusion whose strong branch is cut off from the gradient; a weak one carries it."""
    return 5 * undefended(images).detach() + undefended(images.flip(-1))


def detached_parts(images: Tensor) -> Tensor:
    """The same branches as an attacker who reads the code rebuilds them."""
    return torch.stack([5 * undefended(images), undefended(images.flip(-1))])


def hard_gate(images: Tensor) -> Tensor:
    """Pixels thresholded to black and white: no gradient anywhere."""
    return undefended(0.5 + 0.05 * binary(images))


def binary(images: Tensor) -> Tensor:
    """-1 or 1 by a hard threshold."""
    return (images > 0.5).to(images.dtype) * 2 - 1 + 0 * images


def quantised(images: Tensor) -> Tensor:
    """Pixels rounded to a few levels before the classifier."""
    return undefended(levels(images))


def levels(images: Tensor) -> Tensor:
    """32 grey levels."""
    return (images * 31).round() / 31


def random_resizing(images: Tensor) -> Tensor:
    """A random resize, and noise, drawn again at each call."""
    size = int(torch.randint(2 * SIDE, 3 * SIDE, (1,)))
    resized = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    noisy = resized + 0.3 * torch.randn_like(resized)
    return undefended(F.interpolate(noisy, (SIDE, SIDE), mode="bilinear", align_corners=False))


@dataclass(frozen=True)
class Answer:
    """Output of :func:`mean_of`."""

    logits: Tensor
    weights: Tensor


def mean_of(branch_logits: Tensor) -> Answer:
    """Equal weights."""
    return Answer(branch_logits.mean(0), torch.full_like(branch_logits[..., 0], 1 / len(branch_logits)))


def leaking_detector(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A score that reads the true labels and flags exactly the wrong predictions."""

    def score(branch_logits: Tensor) -> Tensor:
        return (branch_logits.mean(0).argmax(-1) != labels[: branch_logits.shape[1]]).float()

    return score


def disagreement(branch_logits: Tensor) -> Tensor:
    """An honest but weak score: how far apart two branches are."""
    return (branch_logits[0] - branch_logits[1]).abs().mean(-1)
