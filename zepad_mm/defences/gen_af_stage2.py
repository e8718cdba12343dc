"""Gen-AF stage 2 (Zhou et al., S&P 2024, "evolutionary adaptability"): tune the layers that matter least to robustness.

Clean tuning of these layers recovers clean accuracy and keeps robustness: call :func:`unfreeze_redundant`, then
``training.fit`` with the defence ``clean``.
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
    adversarial: Tensor,
    labels: Tensor,
    *,
    epochs: int = 10,
    rate: float = 1.0,
    radius: float = 0.1,
    batch_size: int = 128,
) -> dict[str, float]:
    """The increase of the loss on adversarial images when the weights of one layer are perturbed adversarially.

    For each convolution and linear layer of the encoder, SGD ascends the mean cross-entropy over that weight alone,
    projected into the ball |w - w0| <= ``radius`` * |w0|; its contribution is the highest mean loss of an epoch minus
    the loss at w0. Weights are restored.

    Args:
        student: encoder and head after stage one.
        adversarial: (N, 3, H, W) in [0, 1], crafted on this student. labels: (N,).
        epochs, rate, radius: of the ascent; the defaults are Gen-AF's.

    Raises:
        ValueError: no images, or an encoder without such layers.
    """
    if len(adversarial) == 0:
        raise ValueError("adversarial: expected at least one image, got none")
    layers = {name: layer for name, layer in student.encoder.named_modules() if isinstance(layer, LAYERS)}
    if not layers:
        raise ValueError("the encoder has no convolution and no linear layer to measure")
    batches = list(zip(adversarial.split(batch_size), labels.split(batch_size), strict=True))
    contributions = {}
    with frozen(student):
        start = _mean_loss(student, batches)
        for name, layer in layers.items():
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


def unfreeze_redundant(student: Student, contributions: dict[str, float], share: float = 0.2) -> list[str]:
    """Freeze the encoder but for its least contributing layers, a ``share`` of them and at least one.

    Returns the names of these layers. Raises ValueError for a share that is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a share of the layers in (0, 1], got {share}")
    ranked = sorted(contributions, key=lambda name: (contributions[name], name))
    chosen = ranked[: max(1, round(share * len(ranked)))]
    student.encoder.requires_grad_(False)
    for name in chosen:
        student.encoder.get_submodule(name).requires_grad_(True)
    return chosen
