"""FARE (Schlarmann et al., "Robust CLIP: Unsupervised Adversarial Fine-Tuning of Vision Embeddings", ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zepad_mm.defences.base import DEFENCES, AttackLoss, Batch, Defence, LossParts, Student


@DEFENCES.register("fare")
@dataclass(frozen=True, kw_only=True)
class FARE(Defence):
    """Attacked images shall have the features that the original encoder gave their clean selves. No labels needed.

    L = mean_i |f(x_i') - f0(x_i)|^2 + clean_weight * mean_i |f(x_i) - f0(x_i)|^2, the attack maximising the first
    term. The features are not normalised, as in the paper, so the loss has their scale.
    """

    clean_weight: float = 0.0  # on the same distance of clean images; needs a second forward, joined to the first

    name: ClassVar[str] = "fare"
    needs_original: ClassVar[bool] = True
    trains_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clean_weight < 0:
            raise ValueError(f"clean_weight: expected at least 0, got {self.clean_weight}")

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        original = _original(batch)
        return lambda images: (student.encoder(images) - original).square().sum(-1)

    def loss(self, student: Student, batch: Batch, attacked: Tensor) -> LossParts:
        original = _original(batch)
        if self.clean_weight == 0:
            attacked_loss = (student.encoder(attacked) - original).square().sum(-1).mean()
            return LossParts(attacked_loss, {"distance_attacked": attacked_loss.detach()})
        features = student.encoder(torch.cat([attacked, batch.images]))
        distances = (features - torch.cat([original, original])).square().sum(-1)
        attacked_loss, clean_loss = distances[: len(attacked)].mean(), distances[len(attacked) :].mean()
        parts = {"distance_attacked": attacked_loss.detach(), "distance_clean": clean_loss.detach()}
        return LossParts(attacked_loss + self.clean_weight * clean_loss, parts)


def _original(batch: Batch) -> Tensor:
    if batch.original is None:
        raise ValueError("FARE needs the original encoder's features: fill Batch.original, as training.fit does")
    return batch.original
