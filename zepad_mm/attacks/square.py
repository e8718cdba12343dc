"""Square Attack (Andriushchenko et al. 2020): random search without gradients, unaffected by gradient masking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zepad_mm.attacks.base import ATTACKS, Attack, Model
from zepad_mm.attacks.losses import FEATURE_LOSSES, LOGIT_LOSSES
from zepad_mm.attacks.objective import BestAdversarial, Objective

# shares of the queries after which the area of the squares is halved
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@ATTACKS.register("square")
@dataclass(frozen=True, kw_only=True)
class Square(Attack):
    """Square Attack in L-inf: random search over squares whose pixels are at the limits of the budget."""

    norms: ClassVar[tuple[str, ...]] = ("linf",)

    loss: str = "margin"  # of LOGIT_LOSSES or FEATURE_LOSSES
    queries: int = 1000  # forward passes per sample
    area: float = 0.8  # share of the image covered by the first squares

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
                candidate = start[best.active]
            elif query == 0:  # vertical stripes
                step = self.epsilon * _signs((len(clean), 3, 1, clean.shape[-1]), clean, generator)
                candidate = clean + step
            else:
                candidate = self._add_square(current, query / self.queries, generator)
            candidate = candidate.clamp(clean - self.epsilon, clean + self.epsilon).clamp(0, 1)
            with torch.no_grad():
                outputs = model(candidate)
            if query == 0:
                objective.check(outputs, len(candidate), classes=False)
            best.update(candidate, outputs, objective)
        return best.images

    def _add_square(self, current: Tensor, spent: float, generator: torch.Generator) -> Tensor:
        """``current`` with one random square, at one place for the whole batch, shifted by plus or minus 2 epsilon."""
        height, width = current.shape[-2:]
        area = self.area / 2 ** sum(spent > part for part in HALVINGS)
        side = min(max(1, round((area * height * width) ** 0.5)), height, width)
        top = int(torch.randint(height - side + 1, (1,), generator=generator))
        left = int(torch.randint(width - side + 1, (1,), generator=generator))
        candidate = current.clone()
        step = 2 * self.epsilon * _signs((len(current), 3, 1, 1), current, generator)
        candidate[..., top : top + side, left : left + side] += step
        return candidate


def _signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs, -1 or 1, drawn on the CPU."""
    return (2 * torch.randint(2, shape, generator=generator) - 1).to(like)
