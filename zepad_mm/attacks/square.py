"""Square Attack (Andriushchenko et al. 2020): random squares, no gradient; finds what gradient masking hides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zepad_mm.attacks.base import ATTACKS, Attack, Model
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.objective import BestAdversarial, Objective

# after these parts of the queries the squares' area is halved
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@ATTACKS.register("square")
@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square Attack in L-inf: a random search over squares at the corners of the budget."""

    norms: ClassVar[tuple[str, ...]] = ("linf",)

    loss: str = "margin"  # of LOGIT_LOSSES or FEATURE_LOSSES
    queries: int = 1000  # forward passes per sample
    area: float = 0.8  # part of the image covered by the first squares

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in FEATURE_LOSSES:
            LOGIT_LOSSES.get(self.loss)
        if self.queries < 1 or not 0 < self.area <= 1:
            raise ValueError(f"Square: expected queries >= 1 and area in (0, 1], got {self.queries} and {self.area}")

    def run(
        self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        objective = Objective.make(self.loss, model, images, labels)
        best = BestAdversarial(images)
        if not objective.on_features:
            best.update_from_clean(model, objective)
        for query in range(self.queries):
            if len(best.active) == 0:
                break
            clean, current = images[best.active], best.images[best.active]
            if query == 0 and start is not None:
                tried = start[best.active]
            elif query == 0:  # vertical stripes
                step = self.epsilon * _signs((len(clean), 3, 1, clean.shape[-1]), clean, generator)
                tried = clean + step
            else:
                tried = self._try_square(current, query / self.queries, generator)
            tried = tried.clamp(clean - self.epsilon, clean + self.epsilon).clamp(0, 1)
            with torch.no_grad():
                outputs = model(tried)
            if query == 0:
                objective.check(outputs, len(tried), classes=False)
            best.update(tried, outputs, objective)
        return best.images

    def _try_square(self, current: Tensor, spent: float, generator: torch.Generator) -> Tensor:
        """``current`` with one square, at one place for the whole batch, thrown to the other side of the budget."""
        height, width = current.shape[-2:]
        area = self.area / 2 ** sum(spent > part for part in HALVINGS)
        side = min(max(1, round((area * height * width) ** 0.5)), height, width)
        top = int(torch.randint(height - side + 1, (1,), generator=generator))
        left = int(torch.randint(width - side + 1, (1,), generator=generator))
        tried = current.clone()
        step = 2 * self.epsilon * _signs((len(current), 3, 1, 1), current, generator)
        tried[..., top : top + side, left : left + side] += step
        return tried


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1 at random, drawn on the CPU."""
    return (2 * torch.randint(2, shape, generator=generator) - 1).to(like)
