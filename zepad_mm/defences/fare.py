"""FARE (Schlarmann et al., "Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings", ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.defences.base import DEFENCES, AttackLoss, Batch, Defence, LossParts, Student


@DEFENCES.register("fare")
@dataclass(frozen=True, kw_only=True)
class FARE(Defence):
    """Attacked images shall have the features that the original encoder gave their clean selves. No labels needed.

    L = mean_i |f(x_i') - f0(x_i)|^2 + clean_weight * mean_i |f(x_i) - f0(x_i)|^2, the attack maximising the first
    term. The features are not normalised, as in the paper, so the loss has their scale. Ours: ``label_weight``
    adds CE(x_i') to the loss and to what the attack maximises, so that the known names hold better while the distance
    keeps the rest where it was; the head gets no gradient.
    """

    clean_weight: float = 0.0  # on the same distance of clean images; needs a second forward, joined to the first
    label_weight: float = 0.0  # on the cross-entropy of attacked images; needs labels, and weighs against squared units

    name: ClassVar[str] = "fare"
    needs_original: ClassVar[bool] = True
    trains_head: ClassVar[bool] = False
    keeps_features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("clean_weight", "label_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        original = _original(batch)

        def loss(images: Tensor) -> Tensor:
            features = student.encoder(images)
            distances = (features - original).square().sum(-1)
            if self.label_weight == 0:
                return distances
            labelled = F.cross_entropy(student.head(features), batch.labels, reduction="none")
            return distances + self.label_weight * labelled

        return loss

    def loss(self, student: Student, batch: Batch, attacked: Tensor) -> LossParts:
        original, size = _original(batch), len(attacked)
        images, targets = attacked, original
        if self.clean_weight > 0:
            images, targets = torch.cat([attacked, batch.images]), torch.cat([original, original])
        features = student.encoder(images)
        distances = (features - targets).square().sum(-1)
        total = distances[:size].mean()
        parts = {"distance_attacked": total.detach()}
        if self.clean_weight > 0:
            clean = distances[size:].mean()
            total, parts["distance_clean"] = total + self.clean_weight * clean, clean.detach()
        if self.label_weight > 0:
            ce = F.cross_entropy(student.head(features[:size]), batch.labels)
            total, parts["ce_attacked"] = total + self.label_weight * ce, ce.detach()
        return LossParts(total, parts)


def _original(batch: Batch) -> Tensor:
    if batch.original is None:
        raise ValueError("FARE needs the original encoder's features: fill Batch.original, as training.fit does")
    return batch.original
