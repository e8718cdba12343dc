"""Robust accuracy as a function of the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zepad_mm.attacks.base import Attack, Model
from zepad_mm.utils.validation import check_labels


@dataclass(frozen=True, eq=False)
class Curve:
    """Which images are still correct at each budget.

    Attributes:
        epsilons: in ascending order.
        still_correct: (E, B) bool; once false, it stays false at every larger budget.
    """

    epsilons: tuple[float, ...]
    still_correct: Tensor

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Robust accuracy in [0, 1] at each budget."""
        return tuple(float(share) for share in self.still_correct.double().mean(1))


def curve(
    attack: Attack,
    model: Model,
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[float],
    *,
    generator: torch.Generator | None = None,
) -> Curve:
    """Attack at growing budgets; each budget attacks only the images that are still correct at all smaller ones.

    Args:
        attack: its own epsilon is ignored.
        model, images, labels, generator: as the attack takes them.
        epsilons: budgets in the attack's norm, in any order; 0 is the clean accuracy.

    Raises:
        ValueError: no images, no budgets, or a budget out of the norm's range.
    """
    labels = check_labels(labels, images)
    if not len(images) or not len(epsilons):
        raise ValueError(f"curve: expected images and budgets, got {len(images)} and {len(epsilons)}; e.g. [0, 4/255]")
    ordered = tuple(sorted(set(epsilons)))
    correct = torch.ones(len(images), dtype=torch.bool, device=images.device)
    rows: list[Tensor] = []
    start = images
    for epsilon in ordered:
        scaled = replace(attack, epsilon=epsilon)
        index = correct.nonzero()[:, 0]
        if len(index):
            # adversarial images of the previous budget are inside this one: a better start than a random one
            first = start[index] if rows else None
            adversarial = scaled(model, images[index], labels[index], generator=generator, start=first)
            start = start.index_copy(0, index, adversarial)
            correct = correct.index_copy(0, index, scaled.still_correct(model, adversarial, labels[index]))
        rows.append(correct)
    return Curve(ordered, torch.stack(rows))
