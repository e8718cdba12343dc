"""The plainest universal attack: signed gradient steps on one delta, away from the clean features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, FeatureAttack, SignAscentAttack, Surrogate


@UNIVERSAL_ATTACKS.register("feature_uap")
@dataclass(frozen=True, kw_only=True)
class FeatureUAP(SignAscentAttack, FeatureAttack):
    """Universal perturbation by momentum-sign ascent on a feature loss (as X-Transfer and L4A step)."""

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        return self.ascend(surrogate, generator, lambda delta, batch: surrogate.loss(delta, batch, self.criterion))
