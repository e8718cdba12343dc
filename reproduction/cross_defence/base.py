"""What a defence of the table provides, and the registry of defences.

A defence is a module from images (B, 3, H, W) in [0, 1] to logits (B, C), so that ``evaluate(models=...)`` and any
attack library take it. To add one, write a file with a sub-class of :class:`Defence`, register a function that builds
it, and import it in ``__init__.py``; the parametrised test covers it::

    @DEFENCES.register("my_defence")
    def build(parts: Parts) -> Defence:
        return MyDefence(parts.undefended)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zepad_mm.attacks import Attack
from zepad_mm.attacks.wrappers import Model
from zepad_mm.encoders import Encoder
from zepad_mm.evaluation.subjects import EncoderWithHead
from zepad_mm.models.zepad import ZePAD
from zepad_mm.utils.registry import Registry

# what the authors of a defence attacked it with; see attacks.py
AuthorsAttack = Literal["pgd_undefended", "apgd_undefended", "apgd_defence", "universal"]
CALIBRATION_RATE = 0.05  # share of clean calibration images that a gate treats as attacked


@dataclass(frozen=True)
class Path:
    """A differentiable model that the attacker takes gradients from.

    Attributes:
        name: as records show it.
        model: (B, 3, H, W) to logits (B, C).
        exact: whether it answers as the defence does, so that an image is finished once it is wrong here.
        views: images in the encoder for each attacked image, for the size of batches.
    """

    name: str
    model: Model
    exact: bool = True
    views: int = 1


@dataclass(frozen=True)
class FurtherAttack:
    """An attack on the parts of a defence, with the model that it takes and its images in the encoder per image."""

    name: str
    attack: Attack
    model: Model
    views: int


class Defence(nn.Module):
    """A defended classifier: images (B, 3, H, W) in [0, 1] to logits (B, C).

    Random defences draw from torch's global generator, once per call; see :func:`zepad_mm.attacks.eot`.
    """

    attack: AuthorsAttack = "pgd_undefended"  # what its authors attacked it with
    random: bool = False
    views: int = 1  # images in the encoder at once for each image that it answers
    averages: bool = False  # whether a random defence averages over its randomness by itself: one answer tells enough

    def paths(self) -> list[Path]:
        """The attacker's gradients: by default straight through."""
        return [Path("through", self)]

    def further_attacks(self, epsilon: float, steps: int) -> list[FurtherAttack]:
        """Attacks that need more than the answers of a path: by default none."""
        return []


@dataclass(frozen=True)
class Parts:
    """What defences are built from, for one task.

    Attributes:
        undefended: the public CLIP with the zero-shot head of the task.
        robust: its robust counterpart with the same head.
        defended: the defended model under test, pointed at the classes of the task.
        calibration: (M, 3, H, W) clean images without labels, for thresholds; no test images.
        weights: both encoders with their weights as they were trained; ``undefended`` and ``robust`` are folded copies.
    """

    undefended: EncoderWithHead
    robust: EncoderWithHead
    defended: ZePAD
    calibration: Tensor
    weights: tuple[Encoder, Encoder]


# name -> function that builds it
DEFENCES: Registry[Callable[[Parts], Defence]] = Registry("published defence")


class Plain(Defence):
    """An encoder with its head and nothing around it."""

    attack: AuthorsAttack = "apgd_defence"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


@DEFENCES.register("undefended")
def build_undefended(parts: Parts) -> Defence:
    """The public CLIP as it is."""
    return Plain(parts.undefended)


@DEFENCES.register("robust")
def build_robust(parts: Parts) -> Defence:
    """The robust encoder alone."""
    return Plain(parts.robust)


def eot_batch(model: Model, draws: int) -> Model:
    """The mean log-probability of ``model`` over ``draws`` random answers, taken in one batch: (B, C).

    Does what :func:`zepad_mm.attacks.eot` does without a loop, which on a GPU waits for kernel launches.
    """

    def averaged(images: Tensor) -> Tensor:
        logits = model(images.repeat(draws, 1, 1, 1))
        return logits.unflatten(0, (draws, len(images))).log_softmax(-1).mean(0)

    return averaged


def mean_answer(*logits: Tensor) -> Tensor:
    """The mean log-probability (B, C) of several answers (B, C): wrong only where most of them are."""
    return torch.stack(logits).log_softmax(-1).mean(0)


def lowest_share(scores: Tensor, rate: float = CALIBRATION_RATE) -> float:
    """The threshold below which at most this share of (M,) scores of clean images lies."""
    ordered = scores.flatten().sort().values
    return float(ordered[min(math.floor(rate * len(ordered)), len(ordered) - 1)])


def in_batches(function: Model, images: Tensor, size: int = 100) -> Tensor:
    """``function`` over ``images`` in batches without gradients."""
    with torch.no_grad():
        return torch.cat([function(batch) for batch in images.split(size)])
