"""The contract of every tuning objective: make the attacked batch, then score it. Loops live in ``training``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zepad_mm.attacks.base import frozen, project, random_delta
from zepad_mm.encoders import Encoder, folded_lora
from zepad_mm.utils.config import Config
from zepad_mm.utils.registry import Registry
from zepad_mm.utils.validation import check_epsilon

# name -> configuration class
DEFENCES: Registry[type[Defence]] = Registry("defence")

# attacked images (B, 3, H, W) to a loss per sample (B,) that the attacker maximises
AttackLoss = Callable[[Tensor], Tensor]


class Student(nn.Module):
    """An encoder and the head it is tuned under.

    Args:
        encoder: what is tuned.
        head: features (B, D) to logits (B, C); a zero-shot head has nothing to train, any other trains along.
    """

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [0, 1] to features (B, D) and logits (B, C)."""
        features = self.encoder(images)
        return features, self.head(features)

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to logits (B, C): the callable that attacks see."""
        return self(images)[1]


@dataclass(frozen=True)
class Batch:
    """What a defence is given.

    Attributes:
        images: (B, 3, H, W) in [0, 1], already augmented.
        labels: (B,) class indices.
        indices: (B,) rows of the training set, for error messages and caches.
        original: (B, D) features of ``images`` under the encoder as it was before tuning, where a defence asks for it.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    original: Tensor | None = None


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """The batch in ``count`` parts of equal size; itself for one."""
    if count == 1:
        return [batch]
    rows = torch.arange(len(batch.labels)).chunk(count)
    return [
        Batch(
            batch.images[few], batch.labels[few], batch.indices[few],
            None if batch.original is None else batch.original[few],
        )
        for few in rows
    ]  # fmt: skip


@dataclass(frozen=True)
class LossParts:
    """What is minimised, and its detached summands by name, for the log."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Defence(Config, ABC):
    """A tuning objective: immutable, JSON-able, without state."""

    epsilon: float = 4 / 255  # L-inf budget of the training attack, in pixels of [0, 1]
    attack_steps: int = 3  # gradient steps per batch
    attack_step_size: float | None = None  # in pixels at full epsilon; None: 2.5 * epsilon / steps
    random_start: bool = True  # False starts the attack at the image itself
    clean_fraction: float = 0.0  # share of each batch that is left as it is, in [0, 1)

    name: ClassVar[str] = ""
    needs_original: ClassVar[bool] = False  # whether Batch.original has to be filled
    per_sample: ClassVar[bool] = True  # whether the loss is a mean over samples that know nothing of each other
    trains_head: ClassVar[bool] = True  # whether the objective gives the head a gradient
    keeps_features: ClassVar[bool] = False  # whether it holds features where they were, so that other names survive

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epsilon(self.epsilon)
        if self.attack_steps < 1:
            raise ValueError(f"attack_steps: expected at least 1, got {self.attack_steps}; for no attack use 'clean'")
        if not 0 <= self.clean_fraction < 1:
            raise ValueError(
                f"clean_fraction: expected a share in [0, 1), got {self.clean_fraction}; for no attack use 'clean'"
            )

    def craft(self, student: Student, batch: Batch, epsilon: float, generator: torch.Generator) -> Tensor:
        """Attacked images (B, 3, H, W), detached; the first ``clean_fraction`` of the rows stay as they are.

        Runs on the unwrapped student in eval mode with parameter gradients off, and leaves it as it was.

        Args:
            epsilon: budget of this step, at most ``self.epsilon``: a warm-up scales it and the step size alike.
            generator: source of the random start.
        """
        count = self.clean_count(len(batch.images))
        if epsilon == 0 or count == len(batch.images):
            return batch.images
        part = Batch(
            batch.images[count:],
            batch.labels[count:],
            batch.indices[count:],
            None if batch.original is None else batch.original[count:],
        )
        return torch.cat([batch.images[:count], self.attack(student, part, epsilon, generator)])

    def clean_count(self, size: int) -> int:
        """How many of ``size`` rows stay clean."""
        return int(self.clean_fraction * size)

    def step_size(self, epsilon: float) -> float:
        """Step at a budget of ``epsilon``: scaled with it during the warm-up."""
        if self.attack_step_size is None:
            return min(epsilon, 2.5 * epsilon / self.attack_steps)
        return self.attack_step_size * (epsilon / self.epsilon)

    def attack(self, student: Student, batch: Batch, epsilon: float, generator: torch.Generator) -> Tensor:
        """PGD on :meth:`attack_loss`: a fixed number of steps, the last iterate, as in Madry et al. 2018."""
        current = batch.images
        if self.random_start:
            current = (current + random_delta(current, epsilon, "linf", generator)).clamp(0, 1)
        with frozen(student), folded_lora(student.encoder):
            loss = self.attack_loss(student, batch)
            for _ in range(self.attack_steps):
                current = current.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(loss(current).sum(), current)
                current = sign_step(current.detach(), gradient, batch.images, self.step_size(epsilon), epsilon)
        return current.detach()

    @abstractmethod
    def attack_loss(self, student: Student, batch: Batch) -> AttackLoss:
        """What the training attack maximises."""

    @abstractmethod
    def loss(self, student: Student, batch: Batch, attacked: Tensor) -> LossParts:
        """What one optimiser step minimises, a mean over the batch. ``attacked`` is what :meth:`craft` gave."""

    def selection_view(self, student: Student) -> Callable[[Tensor], Tensor]:
        """The callable that the validation attack is shown; the true network but in one released quirk."""
        return student.logits


def sign_step(current: Tensor, gradient: Tensor, images: Tensor, step_size: float, epsilon: float) -> Tensor:
    """One ascent step, back into the L-inf ball around ``images`` and into [0, 1]."""
    return (images + project(current + step_size * gradient.sign() - images, epsilon, "linf")).clamp(0, 1)


def make_defence(name: str, options: dict[str, Any] | None = None) -> Defence:
    """A defence by its registered name. Raises ValueError for an unknown name or option."""
    return DEFENCES.get(name).from_dict(options or {})
