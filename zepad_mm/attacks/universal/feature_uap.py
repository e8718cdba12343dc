"""The basic universal attack: sign-gradient ascent on the distance to the clean features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, FeatureAttack, SignAscentAttack, Surrogate


@UNIVERSAL_ATTACKS.register("feature_uap")
@dataclass(frozen=True, kw_only=True)
class FeatureUAP(SignAscentAttack, FeatureAttack):
    """Universal perturbation by sign-gradient ascent with momentum on a feature loss."""

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        return self.ascend(surrogate, generator, lambda delta, batch: surrogate.loss(delta, batch, self.criterion))
