"""The contract of tuning objectives: craft the adversarial batch, then score it; ``training.fit`` owns the loop.

To add an objective, write one file with a frozen dataclass that is registered and implements ``attack_loss`` and
``loss``, and import it in ``defences/__init__.py``; ``tests/defences/test_defences.py`` then covers it::

    @DEFENCES.register("my_defence")
    @dataclass(frozen=True, kw_only=True)
    class MyDefence(Defence):
        name: ClassVar[str] = "my_defence"
        def attack_loss(self, student, batch): ...  # adversarial images to losses (B,) that the attack maximises
        def loss(self, student, batch, adversarial): ...  # LossParts, whose total is minimised
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from zepad_mm.attacks.base import frozen, project, random_delta
from zepad_mm.encoders import Encoder, folded_lora
from zepad_mm.utils.config import Config
from zepad_mm.utils.registry import Registry
from zepad_mm.utils.validation import check_epsilon

# name -> configuration class
DEFENCES: Registry[type[Defence]] = Registry("defence")

# images (B, 3, H, W) to losses (B,) that the training attack maximises
AttackLoss = Callable[[Tensor], Tensor]


class Student(nn.Module):
    """An encoder and the head that it is tuned with.

    Args:
        encoder: the encoder to tune.
        head: features (B, D) to logits (B, C); a zero-shot head has no parameters, any other is trained too.
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
        """(B, 3, H, W) in [0, 1] to logits (B, C): the callable that attacks take."""
        return self(images)[1]


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        images: (B, 3, H, W) in [0, 1], already augmented.
        labels: (B,) class indices.
        indices: (B,) rows of the training set, for error messages and caches.
        original: (B, D) features of ``images`` under the encoder before tuning, if the defence needs them.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    original: Tensor | None = None

    def rows(self, few: slice | Tensor) -> Batch:
        """Some of the rows."""
        original = None if self.original is None else self.original[few]
        return Batch(self.images[few], self.labels[few], self.indices[few], original)


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """The batch in ``count`` parts of equal size."""
    if count == 1:
        return [batch]
    return [batch.rows(few) for few in torch.arange(len(batch.labels)).chunk(count)]


@dataclass(frozen=True)
class LossParts:
    """The loss to minimise, and its detached terms by name, for the log."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Defence(Config, ABC):
    """A tuning objective: an immutable, JSON-able configuration; what it learns is in buffers of the student."""

    epsilon: float = 4 / 255  # L-inf budget of the training attack, in pixels of [0, 1]
    attack_steps: int = 3  # gradient steps per batch
    attack_step_size: float | None = None  # in pixels at full epsilon; None: 2.5 * epsilon / steps
    random_start: bool = True  # False: the attack starts at the image itself
    clean_fraction: float = 0.0  # share of each batch that stays clean, in [0, 1)

    name: ClassVar[str] = ""
    role: ClassVar[Literal["robust", "benign"]] = "robust"  # of a branch that is tuned by it
    needs_original: ClassVar[bool] = False  # whether Batch.original is required
    trains_head: ClassVar[bool] = True  # whether the objective gives the head a gradient
    keeps_features: ClassVar[bool] = False  # whether it preserves features, and so zero-shot accuracy on other classes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_epsilon(self.epsilon)
        if self.attack_steps < 1:
            raise ValueError(f"attack_steps: expected at least 1, got {self.attack_steps}; for no attack use 'clean'")
        if not 0 <= self.clean_fraction < 1:
            raise ValueError(
                f"clean_fraction: expected a share in [0, 1), got {self.clean_fraction}; for no attack use 'clean'"
            )

    @property
    def needs_labels(self) -> bool:
        """Whether it reads ``Batch.labels``."""
        return True

    @property
    def per_sample(self) -> bool:
        """Whether the loss is a mean over independent samples."""
        return True

    @property
    def has_state(self) -> bool:
        """Whether :meth:`update` changes buffers of the student."""
        return False

    def prepare(self, student: Student) -> None:
        """Register the buffers that the objective keeps in the student; before the first step, also of a resumed run.

        They are saved with the trainable weights, so that a resumed run has them again.
        """

    def update(self, student: Student, parts: Mapping[str, Tensor]) -> None:
        """Change these buffers after an optimiser step.

        Args:
            parts: of its loss, means over the batch on all processes.
        """

    def craft(self, student: Student, batch: Batch, epsilon: float, generator: torch.Generator) -> Tensor:
        """Adversarial images (B, 3, H, W), detached; the first ``clean_fraction`` of the rows stay clean.

        Runs on the unwrapped student in eval mode without parameter gradients, and restores both.

        Args:
            epsilon: budget of this step, at most ``self.epsilon``; a warm-up scales the step size with it.
            generator: draws the random start.
        """
        count = self.clean_count(len(batch.images))
        if epsilon == 0 or count == len(batch.images):
            return batch.images
        attacked = self.attack(student, batch.rows(slice(count, None)), epsilon, generator)
        return torch.cat([batch.images[:count], attacked])

    def clean_count(self, size: int) -> int:
        """The number of clean rows in a batch of ``size``."""
        return int(self.clean_fraction * size)

    def step_size(self, epsilon: float) -> float:
        """The step size at a budget of ``epsilon``, proportional to it during the warm-up."""
        if self.attack_step_size is None:
            return min(epsilon, 2.5 * epsilon / self.attack_steps)
        return self.attack_step_size * (epsilon / self.epsilon)

    def attack(self, student: Student, batch: Batch, epsilon: float, generator: torch.Generator) -> Tensor:
        """The last iterate of PGD on :meth:`attack_loss` with a fixed number of steps (Madry et al. 2018)."""
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
        """The loss that the training attack maximises."""

    @abstractmethod
    def loss(self, student: Student, batch: Batch, adversarial: Tensor) -> LossParts:
        """The loss of one optimiser step, a mean over the batch; ``adversarial`` is the output of :meth:`craft`."""

    def selection_view(self, student: Student) -> Callable[[Tensor], Tensor]:
        """The callable that the validation attack targets: the true network, except in ``gen_af_released``."""
        return student.logits


def sign_step(current: Tensor, gradient: Tensor, images: Tensor, step_size: float, epsilon: float) -> Tensor:
    """One sign-gradient step, projected into the L-inf ball around ``images`` and into [0, 1]."""
    return (images + project(current + step_size * gradient.sign() - images, epsilon, "linf")).clamp(0, 1)


def make_defence(name: str, options: dict[str, Any] | None = None) -> Defence:
    """A defence by its registered name. Raises ValueError for an unknown name or option."""
    return DEFENCES.get(name).from_dict(options or {})
