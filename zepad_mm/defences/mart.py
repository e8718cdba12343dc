"""MART (Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.defences.base import DEFENCES, AttackLoss, Batch, Defence, LossParts, Student
from zepad_mm.defences.trades import divergence


@DEFENCES.register("mart")
@dataclass(frozen=True, kw_only=True)
class MART(Defence):
    """L = BCE(x') + kl_weight * KL(p(x) || p(x')) (1 - p_y(x)), with an attack on cross-entropy (equation 11).

    BCE(x') = -log p_y(x') - log(1 - max_{k != y} p_k(x')) is boosted cross-entropy. The second term weighs an image by
    the error of its clean prediction.
    """

    epsilon: float = 0.03  # budget, steps and step size of the baselines in the ZePAD paper
    attack_steps: int = 10
    attack_step_size: float | None = 0.007
    kl_weight: float = 5.0  # lambda of the paper

    name: ClassVar[str] = "mart"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight: expected at least 0, got {self.kl_weight}")

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        return lambda images: F.cross_entropy(student.logits(images), batch.labels, reduction="none")

    def loss(self, student: Student, batch: Batch, adversarial: Tensor) -> LossParts:
        adversarial_logits, clean_logits = student(torch.cat([adversarial, batch.images]))[1].split(len(adversarial))
        probabilities, own = adversarial_logits.softmax(-1), batch.labels[:, None]
        rival = probabilities.scatter(-1, own, 0.0).amax(-1)
        boosted = (
            F.cross_entropy(adversarial_logits, batch.labels, reduction="none") - torch.log1p(-rival + 1e-6)
        ).mean()
        clean_error = 1 - clean_logits.softmax(-1).gather(-1, own).squeeze(-1)
        apart = (divergence(clean_logits, adversarial_logits) * clean_error).mean()
        return LossParts(
            boosted + self.kl_weight * apart, {"bce_attacked": boosted.detach(), "divergence": apart.detach()}
        )
