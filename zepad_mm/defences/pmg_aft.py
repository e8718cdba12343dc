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
    """L = CE(attacked) + general_weight * KL(original || attacked) + clean_weight * KL(clean || attacked).

    The attack maximises CE. Made for a CLIP under its zero-shot head; any other head works.

    Two things differ from the paper or may: its "original" is the frozen model's output on the *attacked* image, ours
    is that on the *clean* image, which is what ``Batch.original`` holds (the student's head makes logits of it); and
    both targets are detached here, so that the clean output is not drawn towards the attacked one.
    """

    epsilon: float = 0.03  # of ZePAD's tuning, so that baselines get the same budget
    attack_steps: int = 10
    attack_step_size: float | None = 0.007
    general_weight: float = 1.0  # of the KL to the original model; our choice
    clean_weight: float = 1.0  # of the KL to the tuned model's clean output; our choice

    name: ClassVar[str] = "pmg_aft"
    needs_original: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("general_weight", "clean_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        return lambda images: F.cross_entropy(student.logits(images), batch.labels, reduction="none")

    def loss(self, student: Student, batch: Batch, attacked: Tensor) -> LossParts:
        if batch.original is None:
            raise ValueError("PMG-AFT needs the original encoder's features: fill Batch.original, as training.fit does")
        logits, clean = student(torch.cat([attacked, batch.images]))[1].split(len(attacked))
        original = student.head(batch.original).detach()
        ce = F.cross_entropy(logits, batch.labels)
        general = divergence(original, logits).mean()
        kept = divergence(clean.detach(), logits).mean()
        total = ce + self.general_weight * general + self.clean_weight * kept
        parts = {"ce_attacked": ce, "kl_original": general, "kl_clean": kept}
        return LossParts(total, {name: part.detach() for name, part in parts.items()})
