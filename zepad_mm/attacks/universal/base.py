"""The contract of universal attacks, and the optimisation steps that several of them share.

To add an attack, write one file with a frozen dataclass that is registered and implements ``run``, and import it in
``attacks/universal/__init__.py``; the parametrised tests of ``tests/attacks/test_universal.py`` then cover it::

    @UNIVERSAL_ATTACKS.register("my_attack")
    @dataclass(frozen=True, kw_only=True)
    class MyAttack(SignAscentAttack, FeatureAttack):
        def run(self, surrogate, generator):
            return self.ascend(surrogate, generator, lambda delta, batch: surrogate.loss(delta, batch, self.criterion))
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zepad_mm.attacks.base import (
    NORMS,
    Model,
    check_attackable,
    check_budget,
    check_generator,
    frozen,
    project,
    random_delta,
    resize_delta,
    steepest,
)
from zepad_mm.attacks.losses import FEATURE_LOSSES
from zepad_mm.attacks.perturbation import Perturbation, check_place, paste
from zepad_mm.utils.progress import Progress
from zepad_mm.utils.registry import Registry

log = logging.getLogger(__name__)

FeatureLoss = Callable[[Tensor, Tensor], Tensor]  # as FEATURE_LOSSES holds them
Encoders = Model | Sequence[Model] | Mapping[str, Model]

# name -> universal attack class
UNIVERSAL_ATTACKS: Registry[type[UniversalAttack]] = Registry("universal attack")


class Surrogate:
    """The encoders, images and step budget of one crafting run: iterate for batches, call ``loss`` for the objective.

    Args:
        encoders: callables from images to features (..., B, D).
        images: (N, 3, H, W) in [0, 1].
        attack: defines the budget, the batch size and the number of steps.
        seconds: wall-clock limit that replaces the number of steps.
        progress: show a progress bar.
        generator: draws the order of the images and the positions of patches.
    """

    def __init__(
        self,
        encoders: Sequence[Model],
        images: Tensor,
        attack: UniversalAttack,
        *,
        seconds: float | None,
        progress: bool,
        generator: torch.Generator,
    ) -> None:
        self.encoders = tuple(encoders)
        self.images = images
        self.steps_done = 0
        self.last_loss = math.nan
        self._attack = attack
        self._seconds = seconds
        self._progress = progress
        self._generator = generator
        self._started = time.perf_counter()
        self._clean: dict[int, Tensor] = {}  # encoder -> features (..., N, D), filled on first use
        self._encoded = torch.zeros(len(encoders), len(images), dtype=torch.bool)

    @property
    def seconds_spent(self) -> float:
        """Wall-clock seconds since crafting began."""
        return time.perf_counter() - self._started

    @property
    def fraction_done(self) -> float:
        """The share of the steps or seconds already spent, in [0, 1], for schedules."""
        spent = self.steps_done / self._attack.steps if self._seconds is None else self.seconds_spent / self._seconds
        return min(1.0, spent)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches of shuffled indices until the steps or seconds are spent; at least one batch."""
        size = min(self._attack.batch_size, len(self.images))
        total = self._attack.steps if self._seconds is None else None
        order = torch.empty(0, dtype=torch.long)
        name = f"universal perturbation by {type(self._attack).__name__}"
        with Progress(total=total, disable=not self._progress, desc=name, unit="step") as bar:
            while self.steps_done == 0 or self.fraction_done < 1:
                if len(order) < size:  # an incomplete last batch is dropped: contrastive losses need full batches
                    order = torch.randperm(len(self.images), generator=self._generator)
                yield order[:size]
                order = order[size:]
                self.steps_done += 1
                bar.update()

    def select(self, batch: Tensor) -> Tensor:
        """The images at ``batch`` (B,), (B, 3, H, W)."""
        return self.images[batch.to(self.images.device)]

    def perturb(self, delta: Tensor, batch: Tensor) -> Tensor:
        """Adversarial images (B, 3, H, W): the images at ``batch`` (B,) with ``delta`` (3, h, w) applied."""
        return self._attack.apply(self.select(batch), delta, self._generator)

    def loss(self, delta: Tensor, batch: Tensor, criterion: FeatureLoss, which: Sequence[int] | None = None) -> Tensor:
        """The mean loss of ``delta`` (3, h, w) on a batch over the encoders; a scalar.

        Args:
            criterion: (adversarial features (..., B, D), clean features) to losses; the attacker maximises them.
            which: indices of the encoders; None: all.
        """
        adversarial = self.perturb(delta, batch)
        chosen = range(len(self.encoders)) if which is None else which
        losses = [criterion(self.encoders[i](adversarial), self.clean_features(i, batch)).mean() for i in chosen]
        return self.record_loss(torch.stack(losses).mean())

    def record_loss(self, loss: Tensor) -> Tensor:
        """Record the loss for the provenance and return it."""
        self.last_loss = float(loss.detach())
        return loss

    def all_features(self, which: int) -> Tensor:
        """Clean features of all images, (..., N, D)."""
        for batch in torch.arange(len(self.images)).split(self._attack.batch_size):
            self.clean_features(which, batch)
        return self._clean[which]

    def clean_features(self, which: int, batch: Tensor) -> Tensor:
        """Clean features of a batch, (..., B, D); each image is encoded once per run."""
        new = batch[~self._encoded[which, batch]]
        if len(new):
            with torch.no_grad():
                features = self.encoders[which](self.select(new))
            if not isinstance(features, Tensor) or features.ndim < 2 or features.shape[-2] != len(new):
                got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(
                    f"encoder: expected features of shape ({len(new)}, D) for {len(new)} images, got {got}"
                )
            if which not in self._clean:
                shape = (*features.shape[:-2], len(self.images), features.shape[-1])
                self._clean[which] = features.new_zeros(shape)
            self._clean[which][..., new.to(features.device), :] = features
            self._encoded[which, new] = True
        return self._clean[which][..., batch.to(self._clean[which].device), :]


@dataclass(frozen=True, kw_only=True)
class UniversalAttack(ABC):
    """An attack that crafts one perturbation for all images, without labels. Immutable; its repr is its provenance."""

    norms: ClassVar[tuple[str, ...]] = NORMS  # supported norms

    epsilon: float = 10 / 255  # budget in pixels of [0, 1]
    norm: str = "linf"  # "linf" or "l2"
    image_size: int = 64  # side of the perturbation in pixels; it is resized to images of another size
    steps: int = 150  # optimiser steps
    batch_size: int = 16  # images per step; many small batches are stronger than few large ones
    seed: int = 0  # of all randomness, unless a generator is passed

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.norm)
        if self.norm not in self.norms:
            raise ValueError(f"{type(self).__name__}: expected a norm of {self.norms}, got {self.norm!r}")
        for name in ("image_size", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.min_images > self.batch_size:
            raise ValueError(
                f"batch_size: {type(self).__name__} compares the images of a batch (as info_nce does) and needs at "
                f"least {self.min_images}, got {self.batch_size}"
            )

    @property
    def min_images(self) -> int:
        """The smallest batch that the attack works on."""
        return 1

    def fit(
        self,
        encoder: Encoders,
        images: Tensor,
        *,
        seconds: float | None = None,
        progress: bool = False,
        generator: torch.Generator | None = None,
    ) -> Perturbation:
        """Craft the perturbation.

        Args:
            encoder: maps (B, 3, H, W) in [0, 1] to features (..., B, D). With a list or dictionary of several, their
                losses are averaged.
            images: (N, 3, H, W) in [0, 1], the attacker's own unlabelled images.
            seconds: wall-clock limit that replaces ``steps``; the result then depends on the machine.
            progress: show a progress bar.
            generator: CPU generator of all randomness; seeded with ``seed`` when None. The global RNG is not used.

        Raises:
            ValueError: no images, no encoder, images out of range, or features of the wrong shape.
        """
        models = _models(encoder)
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            images = check_attackable(images)
            if len(images) < self.min_images:
                raise ValueError(f"images: expected at least {self.min_images} image(s) to craft on, got {len(images)}")
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"seconds: expected a positive number, got {seconds}")
            generator = check_generator(generator, self.seed)
            for model in models:
                stack.enter_context(frozen(model))
            surrogate = Surrogate(models, images, self, seconds=seconds, progress=progress, generator=generator)
            raw = self.run(surrogate, generator).detach()
        delta = project(raw.float().cpu().nan_to_num(0.0), self.epsilon, self.norm)
        log.info("%s: loss %.4f after %d steps", type(self).__name__, surrogate.last_loss, surrogate.steps_done)
        about = self._provenance(surrogate, encoder, seconds) | {"seed": generator.initial_seed()}
        return self.to_perturbation(delta, about)

    @abstractmethod
    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        """The crafted delta (3, image_size, image_size); :meth:`fit` projects it into the budget again."""

    def apply(self, images: Tensor, delta: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, 3, H, W) with ``delta`` (3, h, w) applied as the finished perturbation will be."""
        size = (images.shape[-2], images.shape[-1])
        return (images + resize_delta(delta, size, self.epsilon, self.norm)).clamp(0, 1)

    def to_perturbation(self, delta: Tensor, provenance: Mapping[str, Any]) -> Perturbation:
        """The perturbation object of a delta inside the budget."""
        return Perturbation(delta, self.epsilon, self.norm, provenance)

    def _provenance(self, surrogate: Surrogate, encoder: Encoders, seconds: float | None) -> dict[str, object]:
        final = surrogate.last_loss
        return {
            "attack": repr(self),
            "encoders": _names(encoder),
            "images": len(surrogate.images),
            "steps": surrogate.steps_done,
            "final_loss": final if math.isfinite(final) else None,
            "seconds_limit": seconds,
            "wall_s": round(surrogate.seconds_spent, 3),
            "torch": str(torch.__version__),
        }


@dataclass(frozen=True, kw_only=True)
class FeatureAttack(UniversalAttack):
    """A universal attack that maximises one of ``FEATURE_LOSSES`` between clean and adversarial features."""

    loss: str = "feature_cosine"  # of FEATURE_LOSSES

    def __post_init__(self) -> None:
        FEATURE_LOSSES.get(self.loss)
        super().__post_init__()

    @property
    def min_images(self) -> int:
        return 2 if self.loss == "info_nce" else 1

    @property
    def criterion(self) -> FeatureLoss:
        """The loss as a function."""
        return FEATURE_LOSSES.get(self.loss)


@dataclass(frozen=True, kw_only=True)
class SignAscentAttack(UniversalAttack):
    """Gradient ascent with momentum and sign steps on one delta; a cosine schedule reduces the step to a tenth.

    The start is random, because every feature loss has zero gradient at the clean features.
    """

    step_size: float = 0.1  # first step as a share of epsilon
    momentum: float = 0.9  # of gradients scaled to mean magnitude 1; 0 is plain sign ascent

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.step_size > 0 or not 0 <= self.momentum < 1:
            raise ValueError(f"expected step_size > 0 and momentum in [0, 1), got {self.step_size} and {self.momentum}")

    def ascend(
        self, surrogate: Surrogate, generator: torch.Generator, objective: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The delta (3, image_size, image_size) that maximises ``objective(delta, batch)``, a scalar."""
        like = surrogate.images.new_empty(1, 3, self.image_size, self.image_size)
        delta = random_delta(like, self.epsilon, self.norm, generator)[0]
        velocity = torch.zeros_like(delta)
        for batch in surrogate:
            delta.requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(delta, batch), delta)
            gradient = gradient.nan_to_num(0.0)
            velocity = self.momentum * velocity + gradient / gradient.abs().mean().clamp_min(1e-20)
            size = self.step_size * self.epsilon * (0.55 + 0.45 * math.cos(math.pi * surrogate.fraction_done))
            moved = delta.detach() + size * steepest(velocity[None], self.norm)[0]
            delta = project(moved, self.epsilon, self.norm)
        return delta


class PatchAttack(UniversalAttack):
    """Mix-in for attacks that paste a patch; ``epsilon`` is its share of the area.

    List it before the attack among the base classes; the attack declares the field ``place``.
    """

    norms: ClassVar[tuple[str, ...]] = ("patch",)
    place: str

    def __post_init__(self) -> None:
        check_place(self.place)
        super().__post_init__()

    def apply(self, images: Tensor, delta: Tensor, generator: torch.Generator) -> Tensor:
        return paste(images, delta, self.epsilon, self.place, generator)

    def to_perturbation(self, delta: Tensor, provenance: Mapping[str, Any]) -> Perturbation:
        return Perturbation(delta, self.epsilon, self.norm, provenance, self.place)


def _models(encoder: Encoders) -> list[Model]:
    """The encoders as a list."""
    models: list[Any]
    if isinstance(encoder, Mapping | nn.ModuleDict):
        models = list(encoder.values())
    elif isinstance(encoder, Sequence | nn.ModuleList):
        models = list(encoder)
    else:
        models = [encoder]
    if not models or not all(callable(model) for model in models):
        raise ValueError(
            f"encoder: expected a callable from images to features, or a list or dict of them, got {encoder!r:.80}"
        )
    return models


def _names(encoder: Encoders) -> list[str]:
    """The names of the encoders in the provenance: their key, ``source`` or type."""
    if isinstance(encoder, Mapping | nn.ModuleDict):
        return [str(key) for key in encoder]
    return [
        str(getattr(model, "source", None) or getattr(model, "__qualname__", None) or type(model).__name__)
        for model in _models(encoder)
    ]
