"""Clean tuning, for the benign branch: cross-entropy on clean images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.defences.base import DEFENCES, AttackLoss, Batch, Defence, LossParts, Student


@DEFENCES.register("clean")
@dataclass(frozen=True, kw_only=True)
class Clean(Defence):
    """L = CE(x). ``epsilon`` is used by the validation attack only."""

    name: ClassVar[str] = "clean"
    role: ClassVar[Literal["robust", "benign"]] = "benign"

    def craft(self, student: Student, batch: Batch, epsilon: float, generator: torch.Generator) -> Tensor:
        return batch.images

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        raise ValueError("the defence 'clean' trains without an attack")

    def loss(self, student: Student, batch: Batch, adversarial: Tensor) -> LossParts:
        loss = F.cross_entropy(student(batch.images)[1], batch.labels)
        return LossParts(loss, {"ce": loss.detach()})
