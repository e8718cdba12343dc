"""What turns a universal attack into one that pastes a patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from zepad_mm.attacks.patch import check_place, paste
from zepad_mm.attacks.perturbation import Perturbation
from zepad_mm.attacks.universal.base import UniversalAttack


class Patched(UniversalAttack):
    """Mix-in, named before the attack: pixels are replaced, not added to; ``epsilon`` is a share of the area.

    Adds no fields of its own, so that it changes no default of the attack; that declares ``place``.
    """

    norms: ClassVar[tuple[str, ...]] = ("patch",)
    place: str

    def __post_init__(self) -> None:
        check_place(self.place)
        super().__post_init__()

    def apply(self, images: Tensor, delta: Tensor, generator: torch.Generator) -> Tensor:
        return paste(images, delta, self.epsilon, self.place, generator)

    def pack(self, delta: Tensor, provenance: Mapping[str, Any]) -> Perturbation:
        return Perturbation(delta, self.epsilon, self.norm, provenance, self.place)
