"""TeCoA (Mao et al., "Understanding Zero-Shot Adversarial Robustness for Large-Scale Models", ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from zepad_mm.defences.base import DEFENCES, AttackLoss, Batch, Defence, LossParts, Student


@DEFENCES.register("tecoa")
@dataclass(frozen=True, kw_only=True)
class TeCoA(Defence):
    """L = CE(x'): with a zero-shot head, text-guided contrastive adversarial tuning.

    With any other head it is PGD adversarial training (Madry et al. 2018).
    """

    name: ClassVar[str] = "tecoa"

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        return lambda images: F.cross_entropy(student.logits(images), batch.labels, reduction="none")

    def loss(self, student: Student, batch: Batch, adversarial: Tensor) -> LossParts:
        losses = F.cross_entropy(student(adversarial)[1], batch.labels, reduction="none")
        count = self.clean_count(len(adversarial))
        parts = {"ce_attacked": losses[count:].detach().mean()}
        if count:
            parts["ce_clean"] = losses[:count].detach().mean()
        return LossParts(losses.mean(), parts)
