"""ZePAD's tuning objective, which is stage 1 of Gen-AF (Zhou et al., IEEE S&P 2024): cross-entropy + topology.

Two named configurations: ``gen_af`` attacks the true network and aligns the attacked batch with the clean one;
``gen_af_released`` does what the authors' released code does, so that the difference can be measured. Every
difference between them is a field, and can be switched on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.base import random_delta
from zepad_mm.defences.base import DEFENCES, AttackLoss, Batch, Defence, LossParts, Student, sign_step

REFERENCE_BATCH = 256  # the batch that the released weight of 20 was chosen for


@DEFENCES.register("gen_af")
@dataclass(frozen=True, kw_only=True)
class GenAF(Defence):
    """L = CE(attacked) + lambda * L_f, with L_f as in :func:`topology_loss` on the logits.

    L_f sums over all pairs of the batch, per entry it falls as 1/n, so the sum grows with n: with
    ``scale_weight_by_batch`` lambda is ``topology_weight * 256 / n``. With several processes the pairs are those
    of each process's share of the batch, and n is its size.
    """

    epsilon: float = 0.03  # as released: about 7.65/255
    attack_steps: int = 10
    attack_step_size: float | None = 0.007
    topology_weight: float = 20.0  # lambda at a batch of 256
    scale_weight_by_batch: bool = True  # False: lambda fixed at whatever batch
    topology_target: Literal["clean", "attacked"] = "clean"  # whose topology is the target; released: attacked
    detach_target: bool = True  # False: gradients flow through both sides
    label_aware: bool = True  # hard pairs of the target are pushed to 0 (same class) or 2 (different)
    normalised_attack: bool = True  # False: the attack feeds pixels to the backbone without mean and std
    parameter_gradient_leak: bool = False  # True: each attack step adds its CE gradient to the optimiser step
    separate_forwards: bool = False  # True: attacked, then clean, so that BN in train mode sees two batches
    unnormalised_selection: bool = False  # True: the validation attack, too, is made without mean and std

    name: ClassVar[str] = "gen_af"
    per_sample: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topology_weight < 0:
            raise ValueError(f"topology_weight: expected at least 0, got {self.topology_weight}")

    def attack(self, student: Student, batch: Batch, epsilon: float, generator: torch.Generator) -> Tensor:
        if not self.parameter_gradient_leak:
            return super().attack(student, batch, epsilon, generator)
        return self._leaking_attack(student, batch, epsilon, generator)

    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        view = student.logits if self.normalised_attack else _unnormalised(student)
        return lambda images: F.cross_entropy(view(images), batch.labels, reduction="none")

    def loss(self, student: Student, batch: Batch, attacked: Tensor) -> LossParts:
        size = len(attacked)
        if self.separate_forwards:
            attacked_logits, clean_logits = student(attacked)[1], student(batch.images)[1]
        else:
            attacked_logits, clean_logits = student(torch.cat([attacked, batch.images]))[1].split(size)
        ce = F.cross_entropy(attacked_logits, batch.labels)
        clean_losses = F.cross_entropy(clean_logits, batch.labels, reduction="none")
        model, target = attacked_logits, clean_logits
        if self.topology_target == "attacked":
            model, target = clean_logits, attacked_logits
        hardness = clean_losses
        if self.detach_target:
            target, hardness = target.detach(), hardness.detach()
        topology = topology_loss(model, target, batch.labels, hardness if self.label_aware else None)
        weight = self.topology_weight * (REFERENCE_BATCH / size if self.scale_weight_by_batch else 1.0)
        parts = {
            "ce_attacked": ce,
            "ce_clean": clean_losses.mean(),
            "topology": topology,
            "weighted": weight * topology,
        }
        return LossParts(ce + weight * topology, {name: part.detach() for name, part in parts.items()})

    def selection_view(self, student: Student) -> Callable[[Tensor], Tensor]:
        return _unnormalised(student) if self.unnormalised_selection else student.logits

    def _leaking_attack(self, student: Student, batch: Batch, epsilon: float, generator: torch.Generator) -> Tensor:
        """The released attack: ``backward`` on the mean loss at each step, which also fills the parameters' ``.grad``.

        The loop clears gradients before the attack and not after it, so these stay in the optimiser step.
        """
        modes = [(module, module.training) for module in student.modules()]
        current = batch.images
        if self.random_start:
            current = (current + random_delta(current, epsilon, "linf", generator)).clamp(0, 1)
        try:
            student.eval()
            loss = self.attack_loss(student, batch)
            for _ in range(self.attack_steps):
                current = current.detach().requires_grad_(True)
                loss(current).mean().backward()
                if current.grad is None:
                    raise ValueError("the attack found no gradient with respect to the images")
                gradient = current.grad
                current = sign_step(current.detach(), gradient, batch.images, self.step_size(epsilon), epsilon)
        finally:
            for module, training in modes:
                module.training = training
        return current.detach()


@DEFENCES.register("gen_af_released")
@dataclass(frozen=True, kw_only=True)
class GenAFReleased(GenAF):
    """As in the released code, with everything in it that looks like an accident.

    To be complete, train with ``TrainSettings(bn_mode="train", optimizer="adam", lr_encoder=1e-4, lr_head=5e-3,
    weight_decay=8e-4, schedule="exponential", epochs=20, batch_size=256, grad_clip=None, selection="robust",
    validation_attack_steps=1, validation_epsilon=8/255)``. The release selects on the **test** split: which split is
    handed to ``fit`` as ``validation`` is up to the caller, and one that hands in the test split has to say so.
    """

    random_start: bool = False
    scale_weight_by_batch: bool = False
    topology_target: Literal["clean", "attacked"] = "attacked"
    detach_target: bool = False
    normalised_attack: bool = False
    parameter_gradient_leak: bool = True
    separate_forwards: bool = True
    unnormalised_selection: bool = True

    name: ClassVar[str] = "gen_af_released"


def topology_loss(model: Tensor, target: Tensor, labels: Tensor, hardness: Tensor | None = None) -> Tensor:
    """How far the neighbourhoods of one batch are from those of another: L_f of method section 3.2, a sum over n^2.

    Cosine distances less each row's distance to its nearest neighbour become row-normalised similarities Q (model)
    and P (target), which a binary Kullback-Leibler divergence compares.

    Args:
        model: (n, K) logits on the side that is to be moved.
        target: (n, K) logits on the other side, detached by the caller if it shall stay.
        labels: (n,) classes.
        hardness: (n,) clean cross-entropies; pairs of hard samples are pushed to distance 0 in the target if they
            share a class and to 2 if not. None leaves the target as it is.

    Returns:
        A scalar. 0 for a single image, which has no neighbours.
    """
    if len(model) < 2:
        return model.sum() * 0
    low, high, tiny = 1e-7, 2 - 1e-7, 1e-7
    distance = _local_distances(target.float())
    if hardness is not None:
        hard = torch.tanh((hardness.float()[:, None] + hardness.float()[None, :]) / 32)
        sign = torch.where(labels[:, None] == labels[None, :], -1.0, 1.0)
        distance = (1 - hard) * distance + 2 * sign * hard
    p = _row_similarities(distance.clamp(low, high))
    q = _row_similarities(_local_distances(model.float()).clamp(low, high))
    pulled = p * torch.log((p + tiny) / (q + tiny))
    pushed = (1 - p) * torch.log((1 - p + tiny) / (1 - q + tiny))
    return (pulled + pushed).sum()


def _local_distances(logits: Tensor) -> Tensor:
    """(n, n) cosine distances less each row's smallest off the diagonal; the diagonal is 0."""
    unit = F.normalize(logits, dim=-1)
    distance = 1 - unit @ unit.T
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(dim=1, keepdim=True)
    return (distance - nearest).masked_fill(itself, 0.0)


def _row_similarities(distance: Tensor) -> Tensor:
    similarity = (2 - distance) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)


def _unnormalised(student: Student) -> Callable[[Tensor], Tensor]:
    """The student fed with pixels in [0, 1] where it expects normalised ones: the release's attack saw this."""
    encoder = student.encoder
    return lambda images: student.head(encoder.backbone(encoder.preprocess.resize(images)))
