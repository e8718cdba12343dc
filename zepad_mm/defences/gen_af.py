"""Gen-AF stage 1 (Zhou et al., IEEE S&P 2024), ZePAD's tuning objective: cross-entropy and topology alignment.

Two configurations: ``gen_af`` attacks the true network and aligns the adversarial batch with the clean one;
``gen_af_released`` reproduces the released code, so that the difference can be measured. Every difference between
them is a field of its own.
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

REFERENCE_BATCH = 256  # batch size of the released weight of 20


@DEFENCES.register("gen_af")
@dataclass(frozen=True, kw_only=True)
class GenAF(Defence):
    """L = CE(x') + lambda * L_f(x', x), with L_f as in :func:`topology_loss` on the logits.

    L_f sums over all n^2 pairs of the batch, each of order 1/n, so that it grows with n; with ``scale_weight_by_batch``
    lambda is ``topology_weight * 256 / n``. With several processes n is the size of each process's share of the batch.
    """

    epsilon: float = 0.03  # as released: about 7.65/255
    attack_steps: int = 10
    attack_step_size: float | None = 0.007
    topology_weight: float = 20.0  # lambda at a batch of 256
    scale_weight_by_batch: bool = True  # False: lambda does not depend on the batch size
    topology_target: Literal["clean", "attacked"] = "clean"  # the target topology; released: attacked
    detach_target: bool = True  # False: gradients flow through both topologies
    label_aware: bool = True  # hard pairs of the target are pushed to 0 (same class) or 2 (different)
    normalised_attack: bool = True  # False: the attack skips the normalisation by mean and std
    parameter_gradient_leak: bool = False  # True: each attack step adds its CE gradient to the optimiser step
    separate_forwards: bool = False  # True: two forward passes, so that BN in train mode sees two batches
    unnormalised_selection: bool = False  # True: the validation attack skips the normalisation too

    name: ClassVar[str] = "gen_af"

    @property
    def per_sample(self) -> bool:
        return False

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

    def loss(self, student: Student, batch: Batch, adversarial: Tensor) -> LossParts:
        size = len(adversarial)
        if self.separate_forwards:
            adversarial_logits, clean_logits = student(adversarial)[1], student(batch.images)[1]
        else:
            adversarial_logits, clean_logits = student(torch.cat([adversarial, batch.images]))[1].split(size)
        ce = F.cross_entropy(adversarial_logits, batch.labels)
        clean_losses = F.cross_entropy(clean_logits, batch.labels, reduction="none")
        model, target = adversarial_logits, clean_logits
        if self.topology_target == "attacked":
            model, target = clean_logits, adversarial_logits
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

        The loop clears gradients before the attack only, so these enter the optimiser step.
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
                    raise ValueError("the attack got no gradient with respect to the images")
                gradient = current.grad
                current = sign_step(current.detach(), gradient, batch.images, self.step_size(epsilon), epsilon)
        finally:
            for module, training in modes:
                module.training = training
        return current.detach()


@DEFENCES.register("gen_af_released")
@dataclass(frozen=True, kw_only=True)
class GenAFReleased(GenAF):
    """Gen-AF as in the released code, including what looks unintended.

    To reproduce it, train with ``TrainSettings(bn_mode="train", optimizer="adam", lr_encoder=1e-4, lr_head=5e-3,
    weight_decay=8e-4, schedule="exponential", epochs=20, batch_size=256, grad_clip=None, selection="robust",
    validation_attack_steps=1, validation_epsilon=8/255)``. The release selects on the **test** split; a caller who
    passes the test split to ``fit`` as ``validation`` must report it. Validation attacks the student without the
    normalisation of its input, as the release's FGSM does, so that its robust accuracy is too high.
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
    """L_f of method section 3.2: the divergence between the neighbourhoods of two batches, summed over n^2 pairs.

    Cosine distances less each row's distance to its nearest neighbour become row-normalised similarities Q (model)
    and P (target): L_f = sum_ij P log(P / Q) + (1 - P) log((1 - P) / (1 - Q)).

    Args:
        model: (n, K) logits that are aligned with the target.
        target: (n, K) logits of the target; the caller detaches them if they get no gradient.
        labels: (n,) classes.
        hardness: (n,) clean cross-entropies; pairs of hard samples are pushed to distance 0 in the target if they
            share a class and to 2 if not. None: the target is used as it is.

    Returns:
        A scalar; 0 for a single image.
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
    """(n, n) cosine distances minus each row's smallest off the diagonal; the diagonal is 0."""
    unit = F.normalize(logits, dim=-1)
    with torch.autocast(logits.device.type, enabled=False):  # bf16 is too coarse for differences of cosines
        distance = 1 - unit @ unit.T
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(dim=1, keepdim=True)
    return (distance - nearest).masked_fill(itself, 0.0)


def _row_similarities(distance: Tensor) -> Tensor:
    similarity = (2 - distance) / 2
    return similarity / similarity.sum(dim=1, keepdim=True)


def _unnormalised(student: Student) -> Callable[[Tensor], Tensor]:
    """The student without normalisation of its input, as in the attack of the release."""
    encoder = student.encoder
    return lambda images: student.head(encoder.backbone(encoder.preprocess.resize(images)))
