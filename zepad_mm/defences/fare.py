"""FARE (Schlarmann et al., ICML 2024), with the constraint of LORE (2025) and the soft labels of AGFT (2026)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.defences.base import DEFENCES, AttackLoss, Batch, Defence, LossParts, Student
from zepad_mm.defences.trades import divergence
from zepad_mm.defences.universal_training import apply_perturbations, prepare_perturbations
from zepad_mm.utils.validation import check_epsilon

MULTIPLIER = "multiplier"  # buffer of the student: the Lagrange multiplier of the constraint, at least 0
FINITE = -1e4  # logit of what is left out of a softmax


@DEFENCES.register("fare")
@dataclass(frozen=True, kw_only=True)
class FARE(Defence):
    """Matches the features of adversarial images to the frozen encoder's clean features; needs no labels.

    L = mean_i |f(x_i') - f0(x_i)|^2 + clean_weight * mean_i |f(x_i) - f0(x_i)|^2, with features (B, D); the attack
    maximises the first term. As in the paper, features are not normalised, so the loss has their scale, unless
    ``scale_free`` divides each distance by |f0(x_i)|^2.

    ``rho`` adds the constraint of LORE (arXiv 2505.18884) on clean images: mean_i |f(x_i) - f0(x_i)|^2 / |f0(x_i)|^2
    <= rho. Its Lagrange multiplier joins ``clean_weight``; after each step it grows with the relative violation and
    shrinks to no less than 0 where there is none (dual ascent). Here it is one number, in the paper a network. It is
    measured on the rows of ``clean_fraction``, or, where that is 0, in a second forward pass of the whole batch.

    ``soft_label_weight`` adds KL(p0(x_i) || p(x_i')), also to the attack, where p is the softmax of the cosines of a
    feature and T anchors, divided by ``temperature``, and p0 is that of f0 (AGFT, arXiv 2603.29410). Anchors are the
    text embeddings of the head's class names, or f0 of the other images of the batch, which asks for no names.

    ``universal_share`` of each batch is attacked by a few universal perturbations that move with the student, instead
    of an attack of its own on each image (universal adversarial training, Shafahi et al., AAAI 2020).

    Not in a paper: ``label_weight`` adds CE(x_i') to the loss and to the attack, which is more robust on the training
    classes while the distance preserves the features; the head gets no gradient.
    """

    clean_weight: float = 0.0  # weight of the distance of clean images; joins their forward pass to the adversarial one
    label_weight: float = 0.0  # weight of cross-entropy against squared distances; needs labels
    scale_free: bool = False  # distances relative to |f0(x)|^2, so that one weight or rate suits every encoder
    rho: float | None = None  # largest relative distance of clean images in the mean; None: no constraint
    dual_rate: float = 0.02  # change of the multiplier per step where the distance is 2 rho; at most this down
    soft_label_weight: float = 0.0  # weight of the KL to the frozen encoder's soft labels
    soft_labels: Literal["images", "names"] = "images"  # what the anchors are
    temperature: float = 0.05  # of the soft labels, in units of a cosine
    universal_share: float = (
        0.0  # of each batch, at most what clean_fraction leaves: attacked by universal perturbations
    )
    universal_epsilon: float = 10 / 255  # L-inf budget of these
    universal_count: int = 8  # of these

    name: ClassVar[str] = "fare"
    needs_original: ClassVar[bool] = True
    trains_head: ClassVar[bool] = False
    keeps_features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("clean_weight", "label_weight", "soft_label_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")
        for field in ("rho", "dual_rate", "temperature"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field}: expected a positive number, got {value}")
        check_epsilon(self.universal_epsilon, "universal_epsilon")
        if not 0 <= self.universal_share <= 1 - self.clean_fraction:
            raise ValueError(
                f"universal_share: expected at most {1 - self.clean_fraction:g}, what clean_fraction leaves, got "
                f"{self.universal_share}"
            )
        if self.universal_count < 1:
            raise ValueError(f"universal_count: expected at least 1, got {self.universal_count}")

    @property
    def needs_labels(self) -> bool:
        return self.label_weight > 0

    @property
    def per_sample(self) -> bool:
        return self.universal_share == 0 and (self.soft_label_weight == 0 or self.soft_labels == "names")

    @property
    def has_state(self) -> bool:
        return self.rho is not None or self.universal_share > 0

    def prepare(self, student: Student) -> None:
        """Set the multiplier to 0 and the universal perturbations to random ones."""
        if self.rho is not None:
            device = next(student.encoder.parameters()).device
            student.register_buffer(MULTIPLIER, torch.zeros((), device=device))
        if self.universal_share > 0:
            prepare_perturbations(student, self.universal_count)

    def update(self, student: Student, parts: Mapping[str, Tensor]) -> None:
        """One step of dual ascent on the violation that the batch showed."""
        if self.rho is None:
            return
        multiplier = _multiplier(student)
        multiplier.add_(self.dual_rate * (parts["relative_clean"].to(multiplier) / self.rho - 1)).clamp_(min=0)

    def attack(self, student: Student, batch: Batch, epsilon: float, generator: torch.Generator) -> Tensor:
        """Universal perturbations on the first of the attacked rows, PGD on the rest."""
        count = round(self.universal_share / (1 - self.clean_fraction) * len(batch.images))
        if count == 0:
            return super().attack(student, batch, epsilon, generator)
        few, rest = batch.rows(slice(count)), batch.rows(slice(count, None))
        budget = self.universal_epsilon * epsilon / self.epsilon
        attacked = apply_perturbations(student, few.images, self.attack_loss(student, few), budget)
        if len(rest.images) == 0:
            return attacked
        return torch.cat([attacked, super().attack(student, rest, epsilon, generator)])

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        original = _original(batch)

        def loss(images: Tensor) -> Tensor:
            features = student.encoder(images)
            total = self._distances(features, original)
            if self.soft_label_weight > 0:
                total = total + self.soft_label_weight * self._divergences(student, features, original)
            if self.label_weight > 0:
                labelled = F.cross_entropy(student.head(features), batch.labels, reduction="none")
                total = total + self.label_weight * labelled
            return total

        return loss

    def loss(self, student: Student, batch: Batch, adversarial: Tensor) -> LossParts:
        original, size = _original(batch), len(adversarial)
        preserves = self.clean_weight > 0 or self.rho is not None
        images, targets, count = adversarial, original, self.clean_count(size) if preserves else 0
        if preserves and count == 0:
            images, targets = torch.cat([batch.images, adversarial]), torch.cat([original, original])
            count = size
        features = student.encoder(images)
        distances = self._distances(features, targets)
        attacked = features[-size:]  # of the adversarial batch, behind those of a pass on clean images
        total = distances[count:].mean()
        parts = {"distance_attacked": total.detach()}
        if count > 0:
            clean = distances[:count].mean()
            weight: Tensor | float = self.clean_weight
            if self.rho is not None:
                weight = weight + _multiplier(student).clone()
                relative = _squared(features[:count], targets[:count]) / _norms(targets[:count])
                parts["relative_clean"] = relative.mean().detach()
                parts[MULTIPLIER] = _multiplier(student).clone()
            total, parts["distance_clean"] = total + weight * clean, clean.detach()
        if self.soft_label_weight > 0:
            soft = self._divergences(student, attacked, original).mean()
            total, parts["kl_attacked"] = total + self.soft_label_weight * soft, soft.detach()
        if self.label_weight > 0:
            ce = F.cross_entropy(student.head(attacked), batch.labels)
            total, parts["ce_attacked"] = total + self.label_weight * ce, ce.detach()
        return LossParts(total, parts)

    def _distances(self, features: Tensor, original: Tensor) -> Tensor:
        """(B,) squared distances of (B, D) features."""
        distances = _squared(features, original)
        return distances / _norms(original) if self.scale_free else distances

    def _divergences(self, student: Student, features: Tensor, original: Tensor) -> Tensor:
        """(B,) KL of the soft labels of (B, D) features from those of the original ones, in full precision."""
        with torch.autocast(features.device.type, enabled=False):
            mine, frozen = (F.normalize(side.float(), dim=-1) for side in (features, original))
            anchors = frozen if self.soft_labels == "images" else _texts(student)
            logits, targets = (side @ anchors.T / self.temperature for side in (mine, frozen))
            if self.soft_labels == "images":  # an image is no anchor of its own
                itself = torch.eye(len(frozen), dtype=torch.bool, device=frozen.device)
                logits, targets = (side.masked_fill(itself, FINITE) for side in (logits, targets))
            return divergence(targets, logits)


def _squared(features: Tensor, original: Tensor) -> Tensor:
    return (features - original).square().sum(-1)


def _norms(original: Tensor) -> Tensor:
    """(B,) squared norms; features that are all zero, which a ReLU can give, count as 1e-6."""
    return original.square().sum(-1).clamp_min(1e-6)


def _original(batch: Batch) -> Tensor:
    if batch.original is None:
        raise ValueError("FARE needs the original encoder's features: fill Batch.original, as training.fit does")
    return batch.original


def _multiplier(student: Student) -> Tensor:
    multiplier = getattr(student, MULTIPLIER, None)
    if multiplier is None:
        raise ValueError("rho: the student holds no multiplier; call defence.prepare(student), as training.fit does")
    return multiplier


def _texts(student: Student) -> Tensor:
    """(T, D) unit-length text embeddings of the head."""
    text = getattr(student.head, "text", None)
    if text is None:
        raise ValueError(
            f"soft_labels: 'names' needs a zero-shot head, got {type(student.head).__name__}; write "
            "soft_labels='images'"
        )
    return text
