"""Which layers robustness hangs on: the second stage of Gen-AF (Zhou et al., S&P 2024, "evolutionary adaptability").

Stage two tunes the layers that matter least to robustness on clean pictures, so that clean accuracy comes back and
robustness stays: :func:`thaw_redundant`, then ``training.fit`` with the defence ``clean``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.attacks.base import frozen
from zepad_mm.defences.base import Student

LAYERS = (nn.Conv2d, nn.Linear)


def robustness_contributions(
    student: Student,
    attacked: Tensor,
    labels: Tensor,
    *,
    epochs: int = 10,
    rate: float = 1.0,
    radius: float = 0.1,
    batch_size: int = 128,
) -> dict[str, float]:
    """How far the loss on attacked images rises when one layer's weights are moved for the worst.

    For each convolution and linear layer of the encoder, SGD ascends the mean cross-entropy over that weight alone,
    projected into the ball |w - w0| <= ``radius`` * |w0|; its contribution is the highest mean loss of an epoch less
    the loss at w0. Weights are put back.

    Args:
        student: encoder and head after stage one.
        attacked: (N, 3, H, W) in [0, 1], made once on this student. labels: (N,).
        epochs, rate, radius: of the ascent; the defaults are Gen-AF's.

    Raises:
        ValueError: no images, or an encoder without such layers.
    """
    if len(attacked) == 0:
        raise ValueError("attacked: expected at least one image, got none")
    found = {name: layer for name, layer in student.encoder.named_modules() if isinstance(layer, LAYERS)}
    if not found:
        raise ValueError("the encoder has no convolution and no linear layer whose contribution could be measured")
    batches = list(zip(attacked.split(batch_size), labels.split(batch_size), strict=True))
    contributions = {}
    with frozen(student):
        start = _mean_loss(student, batches)
        for name, layer in found.items():
            kept, losses = layer.weight.detach().clone(), []
            layer.weight.requires_grad_(True)
            for _ in range(epochs):
                _ascend(student, layer.weight, kept, batches, rate, radius * float(kept.norm()))
                losses.append(_mean_loss(student, batches))
            layer.weight.requires_grad_(False).copy_(kept)
            contributions[name] = max(losses) - start
    return contributions


@torch.no_grad()
def _mean_loss(student: Student, batches: list[tuple[Tensor, Tensor]]) -> float:
    losses = [F.cross_entropy(student.logits(images), labels, reduction="sum") for images, labels in batches]
    return float(torch.stack(losses).sum()) / sum(len(labels) for _, labels in batches)


def _ascend(
    student: Student,
    weight: Tensor,
    kept: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    rate: float,
    limit: float,
) -> None:
    """One epoch of ascent on ``weight``, which stays within ``limit`` of ``kept``."""
    for images, labels in batches:
        (gradient,) = torch.autograd.grad(F.cross_entropy(student.logits(images), labels), weight)
        with torch.no_grad():
            moved = weight + rate * gradient - kept
            weight.copy_(kept + moved * min(1.0, limit / max(float(moved.norm()), 1e-12)))


def thaw_redundant(student: Student, contributions: dict[str, float], share: float = 0.2) -> list[str]:
    """Leave only the encoder's least contributing layers, ``share`` of them and at least one, and the head to train.

    Returns their names. Raises ValueError for a share that is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a share of the layers in (0, 1], got {share}")
    ranked = sorted(contributions, key=lambda name: (contributions[name], name))
    chosen = ranked[: max(1, round(share * len(ranked)))]
    student.encoder.requires_grad_(False)
    for name in chosen:
        student.encoder.get_submodule(name).requires_grad_(True)
    return chosen
