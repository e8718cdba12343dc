"""PMG-AFT (Wang et al., "Pre-trained Model Guided Fine-Tuning for Zero-Shot Adversarial Robustness", CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.defences.base import DEFENCES, AttackLoss, Batch, Defence, LossParts, Student
from zepad_mm.defences.trades import divergence


@DEFENCES.register("pmg_aft")
@dataclass(frozen=True, kw_only=True)
class PMGAFT(Defence):
    """L = CE(x') + general_weight * KL(p0(x) || p(x')) + clean_weight * KL(p(x) || p(x')).

    The attack maximises CE. Designed for a CLIP with its zero-shot head; any other head works.

    Differs from the paper in p0, here the frozen model's output on the *clean* image (the student's head on
    ``Batch.original``), there on the *adversarial* one; and, perhaps, in that both targets are detached here.
    """

    epsilon: float = 0.03  # budget, steps and step size of the baselines in the ZePAD paper
    attack_steps: int = 10
    attack_step_size: float | None = 0.007
    general_weight: float = 1.0  # weight of the KL to the original model; not from the paper
    clean_weight: float = 1.0  # weight of the KL to the clean output; not from the paper

    name: ClassVar[str] = "pmg_aft"
    needs_original: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("general_weight", "clean_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        return lambda images: F.cross_entropy(student.logits(images), batch.labels, reduction="none")

    def loss(self, student: Student, batch: Batch, adversarial: Tensor) -> LossParts:
        if batch.original is None:
            raise ValueError("PMG-AFT needs the original encoder's features: fill Batch.original, as training.fit does")
        logits, clean = student(torch.cat([adversarial, batch.images]))[1].split(len(adversarial))
        original = student.head(batch.original).detach()
        ce = F.cross_entropy(logits, batch.labels)
        general = divergence(original, logits).mean()
        kept = divergence(clean.detach(), logits).mean()
        total = ce + self.general_weight * general + self.clean_weight * kept
        parts = {"ce_attacked": ce, "kl_original": general, "kl_clean": kept}
        return LossParts(total, {name: part.detach() for name, part in parts.items()})
