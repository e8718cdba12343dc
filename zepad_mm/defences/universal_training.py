"""Universal adversarial training (Shafahi et al., AAAI 2020): perturbations that live in the student and move with it.

A downstream-agnostic attacker adds one perturbation to every image. The student holds a few such perturbations; each
step moves them by the sign of the gradient of the training attack's loss, once, and applies them to a share of the
batch. A perturbation is so worked on by the whole run, at the cost of one attack step on its images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.base import frozen
from zepad_mm.defences.base import AttackLoss, Student
from zepad_mm.encoders import folded_lora
from zepad_mm.utils.seeding import seeded_generator

PERTURBATIONS = "universal_perturbations"  # buffer of the student, (K, 3, H, W) in [-1, 1]: in units of the budget
STEP = 0.1  # of a perturbation, in units of the budget


def prepare_perturbations(student: Student, count: int) -> None:
    """Give the student ``count`` random perturbations of the side that its encoder was trained at."""
    side = student.encoder.preprocess.image_size
    start = torch.rand(count, 3, side, side, generator=seeded_generator(0)) * 2 - 1
    student.register_buffer(PERTURBATIONS, start.to(next(student.encoder.parameters()).device))


def apply_perturbations(student: Student, images: Tensor, loss: AttackLoss, epsilon: float) -> Tensor:
    """Move the perturbations one step up the loss, then add them to the images (B, 3, H, W) in turn; detached.

    Images of another side than the perturbations get them resized.

    Raises:
        ValueError: the student has no perturbations.
    """
    perturbations = getattr(student, PERTURBATIONS, None)
    if perturbations is None:
        raise ValueError("universal_share: call defence.prepare(student) first, as training.fit does")
    rows = torch.arange(len(images), device=images.device) % len(perturbations)
    with frozen(student), folded_lora(student.encoder):
        moving = perturbations.clone().requires_grad_(True)
        attacked = _added(images, moving, rows, epsilon)
        (gradient,) = torch.autograd.grad(loss(attacked).sum(), moving)
    perturbations.add_(STEP * gradient.sign()).clamp_(-1, 1)
    return _added(images, perturbations, rows, epsilon).detach()


def _added(images: Tensor, perturbations: Tensor, rows: Tensor, epsilon: float) -> Tensor:
    if perturbations.shape[-2:] != images.shape[-2:]:
        perturbations = F.interpolate(perturbations, images.shape[-2:], mode="bilinear", align_corners=False)
    return (images + epsilon * perturbations[rows]).clamp(0, 1)
