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
    """Matches the features of adversarial images to the frozen encoder's clean features; needs no labels.

    L = mean_i |f(x_i') - f0(x_i)|^2 + clean_weight * mean_i |f(x_i) - f0(x_i)|^2, with features (B, D); the attack
    maximises the first term. As in the paper, features are not normalised, so the loss has their scale. Not in the
    paper: ``label_weight`` adds CE(x_i') to the loss and to the attack, which is more robust on the training classes
    while the distance preserves the features; the head gets no gradient.
    """

    clean_weight: float = 0.0  # weight of the distance of clean images; joins their forward pass to the adversarial one
    label_weight: float = 0.0  # weight of cross-entropy against squared distances; needs labels

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

    def loss(self, student: Student, batch: Batch, adversarial: Tensor) -> LossParts:
        original, size = _original(batch), len(adversarial)
        images, targets = adversarial, original
        if self.clean_weight > 0:
            images, targets = torch.cat([adversarial, batch.images]), torch.cat([original, original])
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
