"""A universal attack in a package of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks import UNIVERSAL_ATTACKS, UniversalAttack
from zepad_mm.attacks.universal.base import Surrogate


@UNIVERSAL_ATTACKS.register("stripes")
@dataclass(frozen=True, kw_only=True)
class Stripes(UniversalAttack):
    """Horizontal stripes at the budget; it asks no encoder."""

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        rows = 1 - 2.0 * (torch.arange(self.image_size) // 4 % 2)
        return self.epsilon * rows.view(1, -1, 1).expand(3, -1, self.image_size)
