"""The same attack at growing budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zepad_mm.attacks.base import Attack, Model
from zepad_mm.utils.validation import check_labels


@dataclass(frozen=True, eq=False)
class Curve:
    """What holds at each budget.

    Attributes:
        epsilons: in growing order.
        holds: (E, B) bool, never true again where it was false at a smaller budget.
    """

    epsilons: tuple[float, ...]
    still_correct: Tensor

    @property
    def accuracy(self) -> tuple[float, ...]:
        """In [0, 1], one for each budget."""
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
    """Attack at each budget what held at all smaller ones; what a smaller budget breaks, a larger one breaks.

    Args:
        attack: its own epsilon is left aside.
        model, images, labels, generator: as the attack takes them.
        epsilons: budgets in the attack's norm, in any order; 0 is the clean accuracy.

    Raises:
        ValueError: no images, no budgets, or one that the norm does not know.
    """
    labels = check_labels(labels, images)
    if not len(images) or not len(epsilons):
        raise ValueError(f"curve: expected images and budgets, got {len(images)} and {len(epsilons)}; e.g. [0, 4/255]")
    ordered = tuple(sorted(set(epsilons)))
    held = torch.ones(len(images), dtype=torch.bool, device=images.device)
    rows: list[Tensor] = []
    start = images
    for epsilon in ordered:
        at = replace(attack, epsilon=epsilon)
        index = held.nonzero()[:, 0]
        if len(index):
            # the images of the budget before are inside this one: a better place to set out from than at random
            first = start[index] if rows else None
            struck = at(model, images[index], labels[index], generator=generator, start=first)
            start = start.index_copy(0, index, struck)
            held = held.index_copy(0, index, at.still_correct(model, struck, labels[index]))
        rows.append(held)
    return Curve(ordered, torch.stack(rows))
