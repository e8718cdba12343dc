"""RayS (Chen and Gu 2020): a decision-based attack, which sees nothing but whether the prediction is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zepad_mm.attacks.base import ATTACKS, Attack, Model
from zepad_mm.attacks.objective import BestAdversarial, Objective

TOLERANCE = 0.1  # of the radius: a bisection ends once its interval is this share of it


@ATTACKS.register("rays")
@dataclass(frozen=True, kw_only=True)
class RayS(Attack):
    """Searches, among directions of signs, for the one with the shortest way to a wrong prediction.

    The signs of one block of the image are flipped at a time, of halves first, then of quarters and so on. A direction
    is kept when the image is wrong on it at the radius of the best one so far, which bisection then shortens. Only
    predicted classes are used: no gradient, logit or score.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)

    queries: int = 300  # forward passes per sample

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1:
            raise ValueError(f"RayS: expected queries of at least 1, got {self.queries}")

    def run(
        self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        search = _Search(model, images, Objective.make("margin", model, images, labels), self.epsilon)
        if start is not None and len(search.best.active):
            search.try_start(start)
        blocks = _halvings(images[0].numel())
        while search.queries < self.queries and len(search.best.active):
            first, end = next(blocks)
            search.try_block(first, end, self.queries)
        best = search.best
        best.images[best.active] = (images + self.epsilon * search.signs)[best.active].clamp(0, 1)
        return best.images


class _Search:
    """The signs (B, 3, H, W) and radii (B,) found so far, of the samples that are still right within the budget."""

    def __init__(self, model: Model, images: Tensor, objective: Objective, epsilon: float) -> None:
        self.model, self.images, self.objective, self.epsilon = model, images, objective, epsilon
        self.best = BestAdversarial(images)
        self.best.update_from_clean(model, objective)
        self.signs = torch.ones_like(images)
        self.radius = torch.ones(len(images), device=images.device)
        self.queries = 1

    def try_start(self, start: Tensor) -> None:
        """Take the direction of given images (B, 3, H, W)."""
        index = self.best.active
        moved = (start - self.images)[index]
        self.signs[index] = torch.where(moved < 0, -1.0, 1.0)
        wrong = self._wrong(start[index], index)
        self._finish(index, start[index], wrong)

    def try_block(self, first: int, end: int, most: int) -> None:
        """Flip the signs between two places of the flattened images where that keeps the prediction wrong."""
        index = self.best.active
        signs = self.signs[index].flatten(1)
        signs[:, first:end] *= -1
        signs = signs.view(len(index), *self.images.shape[1:])
        wrong = self._wrong(self._moved(index, signs, self.radius[index]), index)
        index, signs = index[wrong], signs[wrong]
        if len(index):
            self.signs[index] = signs
            self._shorten(index, signs, most)

    def _shorten(self, index: Tensor, signs: Tensor, most: int) -> None:
        """Bisect the radius of some samples; those that are wrong within the budget are finished."""
        low, high = torch.zeros_like(self.radius[index]), self.radius[index]
        inside = self._moved(index, signs, torch.full_like(high, self.epsilon))
        wrong = self._wrong(inside, index)
        self._finish(index, inside, wrong)
        low = low.masked_fill(~wrong, self.epsilon)
        while self.queries < most and bool((high - low > TOLERANCE * high).any()) and not bool(wrong.all()):
            middle = (low + high) / 2
            hit = self._wrong(self._moved(index, signs, middle), index)
            low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
        self.radius[index] = high

    def _finish(self, index: Tensor, adversarial: Tensor, wrong: Tensor) -> None:
        """Keep adversarial images inside the budget, whose samples leave the search."""
        best = self.best
        best.images[index[wrong]] = adversarial[wrong]
        best.active = best.active[~torch.isin(best.active, index[wrong])]

    def _moved(self, index: Tensor, signs: Tensor, radius: Tensor) -> Tensor:
        return (self.images[index] + radius[:, None, None, None] * signs).clamp(0, 1)

    def _wrong(self, moved: Tensor, index: Tensor) -> Tensor:
        """(b,) bool: one query for each sample at ``index``."""
        self.queries += 1
        with torch.no_grad():
            right = self.objective.still_correct(self.model(moved), index)
        assert right is not None
        return ~right


def _halvings(size: int) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the blocks of a vector: the whole, its halves, its quarters and so on, again and again."""
    while True:
        parts = 1
        while parts <= size:
            for part in range(parts):
                yield part * size // parts, (part + 1) * size // parts
            parts *= 2
