"""The contract of every universal attack, and what the attacker owns: encoders and unlabelled pictures."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from zepad_mm.attacks.base import Model, check_attackable, check_budget, check_generator, fit_delta, frozen, project
from zepad_mm.attacks.losses import FEATURE_LOSSES
from zepad_mm.attacks.perturbation import Perturbation
from zepad_mm.registry import Registry

log = logging.getLogger(__name__)

Encoders = Model | Sequence[Model] | Mapping[str, Model]

# name -> universal attack class
UNIVERSAL_ATTACKS: Registry[type[UniversalAttack]] = Registry("universal attack")


class Surrogate:
    """What a universal attack is crafted on, and how long: iterate to get batches, ask ``loss`` how bad a delta is.

    Args:
        encoders: callables from images to features (..., B, D).
        images: (N, 3, H, W) in [0, 1].
        attack: its loss, batch size and number of steps are used.
        seconds: wall-clock budget in place of the number of steps.
        progress: show a progress bar.
        generator: draws the order of the pictures.
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
        self.images = images
        self.steps_done = 0
        self.last_loss = math.nan
        self._encoders = encoders
        self._attack = attack
        self._criterion = FEATURE_LOSSES.get(attack.loss)
        self._seconds = seconds
        self._progress = progress
        self._generator = generator
        self._started = time.perf_counter()
        self._clean: dict[int, Tensor] = {}  # encoder -> (..., N, D), filled as pictures come up
        self._known = torch.zeros(len(encoders), len(images), dtype=torch.bool)

    @property
    def seconds_spent(self) -> float:
        """Wall-clock seconds since crafting began."""
        return time.perf_counter() - self._started

    @property
    def done(self) -> float:
        """The part of the budget already spent, in [0, 1], for schedules."""
        spent = self.steps_done / self._attack.steps if self._seconds is None else self.seconds_spent / self._seconds
        return min(1.0, spent)

    def __iter__(self) -> Iterator[Tensor]:
        """Index batches over shuffled pictures until the budget is spent; at least one."""
        size = min(self._attack.batch_size, len(self.images))
        total = self._attack.steps if self._seconds is None else None
        order = torch.empty(0, dtype=torch.long)
        with tqdm(total=total, disable=not self._progress, desc=type(self._attack).__name__) as bar:
            while self.steps_done == 0 or self.done < 1:
                if len(order) < size:  # a short rest is dropped: contrastive losses want full batches
                    order = torch.randperm(len(self.images), generator=self._generator)
                yield order[:size]
                order = order[size:]
                self.steps_done += 1
                bar.update()

    def loss(self, delta: Tensor, batch: Tensor) -> Tensor:
        """How far ``delta`` (3, H, W) drives the features of a batch away; a scalar, averaged over the encoders."""
        images = self.images[batch.to(self.images.device)]
        delta = fit_delta(delta, (images.shape[-2], images.shape[-1]), self._attack.epsilon, self._attack.norm)
        attacked = (images + delta).clamp(0, 1)
        losses = [
            self._criterion(encoder(attacked), self._clean_features(which, batch)).mean()
            for which, encoder in enumerate(self._encoders)
        ]
        loss = torch.stack(losses).mean()
        self.last_loss = float(loss.detach())
        return loss

    def _clean_features(self, which: int, batch: Tensor) -> Tensor:
        """Features of the pictures as they are; each is encoded once in the whole run."""
        new = batch[~self._known[which, batch]]
        if len(new):
            with torch.no_grad():
                features = self._encoders[which](self.images[new.to(self.images.device)])
            if not isinstance(features, Tensor) or features.ndim < 2 or features.shape[-2] != len(new):
                got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(
                    f"encoder: expected features of shape ({len(new)}, D) for {len(new)} images, got {got}"
                )
            if which not in self._clean:
                shape = (*features.shape[:-2], len(self.images), features.shape[-1])
                self._clean[which] = features.new_zeros(shape)
            self._clean[which][..., new.to(features.device), :] = features
            self._known[which, new] = True
        return self._clean[which][..., batch.to(self._clean[which].device), :]


@dataclass(frozen=True, kw_only=True)
class UniversalAttack(ABC):
    """One perturbation for all images, without a label. Immutable; its repr goes into the provenance."""

    epsilon: float = 10 / 255  # budget in pixels of [0, 1]
    norm: str = "linf"  # "linf" or "l2"
    image_size: int = 64  # side of the perturbation; it is resized to pictures of another size
    loss: str = "feature_cosine"  # of FEATURE_LOSSES
    steps: int = 150  # optimiser steps
    batch_size: int = 16  # pictures per step; more and smaller steps beat fewer and larger ones
    seed: int = 0  # of everything random, when no generator is handed in

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.norm)
        FEATURE_LOSSES.get(self.loss)
        for name in ("image_size", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.loss == "info_nce" and self.batch_size < 2:
            raise ValueError("batch_size: info_nce contrasts pictures with each other and needs at least 2, got 1")

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
            encoder: maps (B, 3, H, W) in [0, 1] to features (..., B, D). A list or dictionary of several crafts on
                all at once: their losses are averaged.
            images: (N, 3, H, W) in [0, 1], the attacker's own unlabelled pictures.
            seconds: wall-clock budget in place of ``steps``; what comes out then depends on the machine.
            progress: show a progress bar.
            generator: CPU source of all randomness; seeded with ``seed`` when None. The global RNG is never touched.

        Raises:
            ValueError: no pictures, no encoder, pictures out of range, features of a wrong shape.
        """
        models = _models(encoder)
        with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            images = check_attackable(images)
            least = 2 if self.loss == "info_nce" else 1
            if len(images) < least:
                raise ValueError(f"images: expected at least {least} picture(s) to craft on, got {len(images)}")
            if seconds is not None and not 0 < seconds < math.inf:
                raise ValueError(f"seconds: expected a positive number, got {seconds}")
            generator = check_generator(generator, self.seed)
            for model in models:
                stack.enter_context(frozen(model))
            surrogate = Surrogate(models, images, self, seconds=seconds, progress=progress, generator=generator)
            raw = self.run(surrogate, generator).detach()
        delta = project(raw.float().cpu().nan_to_num(0.0), self.epsilon, self.norm)
        log.info("%r: loss %.4f after %d steps", self, surrogate.last_loss, surrogate.steps_done)
        about = self._provenance(surrogate, encoder, seconds) | {"seed": generator.initial_seed()}
        return Perturbation(delta, self.epsilon, self.norm, about)

    @abstractmethod
    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        """The attack itself: (3, image_size, image_size); what it returns is projected again."""

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


def _models(encoder: Encoders) -> list[Model]:
    """One or several callables as a list."""
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
    """How the encoders are called in the provenance: their key, their ``source``, or their type."""
    if isinstance(encoder, Mapping | nn.ModuleDict):
        return [str(key) for key in encoder]
    return [
        str(getattr(model, "source", None) or getattr(model, "__qualname__", None) or type(model).__name__)
        for model in _models(encoder)
    ]
