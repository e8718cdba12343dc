"""PGD that harms an encoder while a gate, which reads the same image, does not notice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.base import Model
from zepad_mm.attacks.losses import margin
from zepad_mm.attacks.objective import BestAdversarial, Objective
from zepad_mm.attacks.pgd import PGD


@dataclass(frozen=True, kw_only=True)
class GateAwarePGD(PGD):
    """PGD on a model that gives (B, D + 1), features or logits and a gate's score z last, which is kept low.

    Without labels it maximises ``|f - f0|^2 / |f0|^2 - gate_weight * z``, with labels the margin in place of the
    distance.
    """

    gate_weight: float = 0.1
    stop_when_wrong: bool = False

    def run(
        self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        def moved(outputs: Tensor, clean: Tensor) -> Tensor:
            size = clean[..., :-1].square().sum(-1).clamp_min(1e-12)
            distance = (outputs[..., :-1] - clean[..., :-1]).square().sum(-1) / size
            return distance - self.gate_weight * outputs[..., -1]

        def wrong(outputs: Tensor, target: Tensor) -> Tensor:
            return margin(outputs[..., :-1], target) - self.gate_weight * outputs[..., -1]

        if labels is None:
            with torch.no_grad():
                objective = Objective(moved, model(images), on_features=True)
        else:
            objective = Objective(wrong, labels, on_features=False)
        best = BestAdversarial(images)
        self.ascend(model, images, [objective], best, generator, start)
        return best.images
