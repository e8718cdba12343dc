"""TRADES (Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.defences.base import DEFENCES, AttackLoss, Batch, Defence, LossParts, Student


@DEFENCES.register("trades")
@dataclass(frozen=True, kw_only=True)
class TRADES(Defence):
    """L = CE(x) + beta * KL(p(x) || p(x')), with an attack on the same divergence (equation 5).

    Both sides of the divergence get gradients in the loss, as released; in the attack p(x) is constant.
    """

    epsilon: float = 0.03  # budget, steps and step size of the baselines in the ZePAD paper
    attack_steps: int = 10
    attack_step_size: float | None = 0.007
    beta: float = 6.0  # weight of the divergence, 1 / lambda in the paper

    name: ClassVar[str] = "trades"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ValueError(f"beta: expected at least 0, got {self.beta}")
        if not self.random_start:
            raise ValueError("random_start: TRADES needs True, its divergence has no gradient at the image itself")

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        with torch.no_grad():
            clean = student.logits(batch.images)
        return lambda images: divergence(clean, student.logits(images))

    def loss(self, student: Student, batch: Batch, adversarial: Tensor) -> LossParts:
        adversarial_logits, clean_logits = student(torch.cat([adversarial, batch.images]))[1].split(len(adversarial))
        ce, apart = F.cross_entropy(clean_logits, batch.labels), divergence(clean_logits, adversarial_logits).mean()
        return LossParts(ce + self.beta * apart, {"ce_clean": ce.detach(), "divergence": apart.detach()})


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL(p(x) || p(x')) for each row of logits (n, C), in nats: (n,)."""
    return F.kl_div(adversarial.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1)
