"""The contract of per-sample attacks, and the geometry of the L-inf and L2 budgets.

To add an attack, write one file with a frozen dataclass that is registered, has the field ``loss`` and implements
``run``, and import it in ``attacks/__init__.py``; the parametrised tests of ``tests/attacks/test_attacks.py`` then
cover it. :class:`~zepad_mm.attacks.objective.Objective` checks labels and outputs and computes losses and gradients,
:class:`~zepad_mm.attacks.objective.BestAdversarial` drops samples once they are misclassified::

    @ATTACKS.register("my_attack")
    @dataclass(frozen=True, kw_only=True)
    class MyAttack(Attack):  # or RestartAttack, as PGD
        loss: str = "margin"  # of LOGIT_LOSSES or FEATURE_LOSSES

        def run(self, model, images, labels, generator, start):
            objective = Objective.make(self.loss, model, images, labels)
            best = BestAdversarial(images)
            if not objective.on_features:
                best.update_from_clean(model, objective)
            ...  # while len(best.active): best.update(candidates, outputs, objective)
            return best.images  # __call__ projects them into the budget
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.attacks.wrappers import Model, bpda
from zepad_mm.utils.registry import Registry
from zepad_mm.utils.seeding import seeded_generator
from zepad_mm.utils.validation import check_epsilon, check_images

NORMS = ("linf", "l2")

# name -> attack class
ATTACKS: Registry[type[Attack]] = Registry("attack")


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Context in which a model is in eval mode without parameter gradients; both are restored afterwards.

    Works on modules, on bound methods of modules, and on functions and partials that refer to modules by name. Modules
    hidden deeper (in lists, in attributes of other objects) are not found and stay unchanged.
    """
    roots = modules_of(model)
    modes = [(child, child.training) for root in roots for child in root.modules()]
    trainable = [parameter for root in roots for parameter in root.parameters() if parameter.requires_grad]
    try:
        for root in roots:
            root.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for child, training in modes:
            child.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


def modules_of(model: object, seen: set[int] | None = None) -> list[nn.Module]:
    """The modules that a callable refers to; methods, partials and closures are searched.

    Args:
        seen: ids of objects already searched, since functions may refer to themselves and to each other.
    """
    seen = set() if seen is None else seen
    if isinstance(model, nn.Module):
        return [model]
    if id(model) in seen:
        return []
    seen.add(id(model))
    held: list[object]
    if isinstance(model, functools.partial):
        held = [model.func, *model.args, *model.keywords.values()]
    elif inspect.ismethod(model):
        held = [model.__self__]
    elif inspect.isfunction(model):
        names = inspect.getclosurevars(model)
        modules = [value for value in names.globals.values() if isinstance(value, nn.Module)]
        return modules + [module for value in names.nonlocals.values() for module in modules_of(value, seen)]
    else:
        return []
    return [module for value in held for module in modules_of(value, seen)]


def project(delta: Tensor, epsilon: float, norm: str) -> Tensor:
    """The nearest perturbation inside the budget; ``delta`` (..., 3, H, W), L2 over the last three axes.

    The pixels of a patch are clamped to [0, 1]; its area is enforced when it is pasted.
    """
    if norm == "patch":
        return delta.clamp(0, 1)
    if norm == "linf":
        return delta.clamp(-epsilon, epsilon)
    length = delta.flatten(-3).norm(dim=-1)[..., None, None, None]
    return delta * (epsilon / length.clamp_min(1e-12)).clamp_max(1)


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The direction of steepest ascent with unit length in ``norm``."""
    if norm == "linf":
        return gradient.sign()
    # divided by its largest entry first: the squares of a saturated model's tiny gradient would underflow
    gradient = gradient / gradient.flatten(1).abs().amax(1)[:, None, None, None].clamp_min(1e-37)
    return gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-12)


def resize_delta(delta: Tensor, size: tuple[int, int], epsilon: float, norm: str) -> Tensor:
    """A universal delta (3, h, w) resized to images of ``size`` (H, W) and projected into the budget again."""
    if (delta.shape[-2], delta.shape[-1]) == size:
        return delta
    return project(F.interpolate(delta[None], size, mode="bilinear", align_corners=False)[0], epsilon, norm)


def _round_to_levels(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


def check_levels(images: Tensor) -> None:
    """Raise ValueError unless every pixel is a multiple of 1 / 255."""
    off = float((images * 255 - (images * 255).round()).abs().max()) if images.numel() else 0.0
    if off > 1e-3:
        raise ValueError(
            f"images: expected multiples of 1 / 255, as in 8-bit images, got values {off:.2g} levels away from one; "
            "write (images * 255).round() / 255 first"
        )


def round_within_budget(images: Tensor, moved: Tensor, epsilon: float, norm: str) -> Tensor:
    """``moved`` rounded to multiples of 1 / 255 within the budget around ``images``, which are 8-bit images.

    An L2 perturbation that leaves the budget when rounded is shrunk, by bisection, until its rounded form fits.
    """
    clean = (images * 255).round()
    delta = project(moved - images, epsilon, norm) * 255
    if norm == "linf":
        whole = math.floor(epsilon * 255 + 1e-4)
        return (clean + delta.round().clamp(-whole, whole)).clamp(0, 255) / 255
    low, high = torch.zeros_like(delta[:, :1, :1, :1]), torch.ones_like(delta[:, :1, :1, :1])
    shrink = high
    for _ in range(24):
        length = (delta * shrink).round().flatten(1).norm(dim=1).view_as(low)
        fits = length <= epsilon * 255
        low, high = torch.where(fits, shrink, low), torch.where(fits, high, shrink)
        shrink = (low + high) / 2
    return (clean + (delta * low).round()).clamp(0, 255) / 255


def check_budget(epsilon: float, norm: str) -> None:
    """Raise ValueError for an unknown norm, or an epsilon outside [0, 1] (L-inf, patch) or below 0 (L2)."""
    if norm not in (*NORMS, "patch"):
        raise ValueError(f"norm: expected one of {NORMS}, or 'patch' for universal attacks, got {norm!r}")
    if norm == "patch":
        if not isinstance(epsilon, int | float) or not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon: expected the patch's share of the area in [0, 1], e.g. 0.03, got {epsilon!r}")
    elif norm == "linf":
        check_epsilon(epsilon)
    elif not isinstance(epsilon, int | float) or not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon: expected a finite L2 length of at least 0 in pixels of [0, 1], got {epsilon!r}")


def check_generator(generator: torch.Generator | None, seed: int = 0) -> torch.Generator:
    """The given generator, or a CPU one seeded with ``seed``. Raises ValueError for a generator on another device."""
    if generator is None:
        return seeded_generator(seed)
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator: expected a CPU generator, got one on {generator.device}; attacks draw on the CPU so that a "
            "seed gives the same result on every device: torch.Generator().manual_seed(0)"
        )
    return generator


def check_attackable(images: Tensor) -> Tensor:
    """The images, detached. Raises ValueError unless they are float32 or float64 in [0, 1]."""
    images = check_images(images.detach() if isinstance(images, Tensor) else images)
    if images.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"images: an attack needs float32 pixels, got {images.dtype}, whose rounding is as coarse as the "
            "budget; write images.float() and run the model under torch.autocast"
        )
    return images.clone() if images.is_inference() else images


def random_delta(like: Tensor, epsilon: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """A random delta: uniform in the L-inf box; for L2 of uniform direction and radius. Drawn on the CPU."""
    noise = torch.empty(like.shape, dtype=like.dtype)
    if norm == "linf":
        return noise.uniform_(-epsilon, epsilon, generator=generator).to(like.device)
    noise.normal_(generator=generator)
    radius = torch.empty(len(like), 1, 1, 1, dtype=like.dtype).uniform_(0, epsilon, generator=generator)
    return (steepest(noise, "l2") * radius).to(like.device)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A per-sample attack inside a budget. Immutable; its repr identifies it in tests and records."""

    norms: ClassVar[tuple[str, ...]] = NORMS  # supported norms

    epsilon: float = 4 / 255  # budget in pixels of [0, 1]
    norm: str = "linf"  # "linf" or "l2"
    quantize: bool = False  # True: adversarial images are multiples of 1 / 255, as in 8-bit files

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.norm)
        if self.norm not in self.norms:
            raise ValueError(f"{type(self).__name__}: expected a norm of {self.norms}, got {self.norm!r}")

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Adversarial images: same shape, inside the budget and [0, 1], whatever :meth:`run` returned.

        Args:
            model: maps (B, 3, H, W) in [0, 1] to logits or features.
            images: (B, 3, H, W) in [0, 1].
            labels: (B,) true classes, for losses on logits.
            generator: source of all randomness; a fixed seed 0 when None. The global RNG is never touched.
            start: (B, 3, H, W) images to start from, e.g. transferred ones; clipped to the budget first. Further
                restarts start at random.

        Raises:
            ValueError: images, labels or outputs of the wrong shape or range; with ``quantize``, images that are not
                multiples of 1 / 255.
        """
        with torch.inference_mode(False), torch.enable_grad():  # a caller's no_grad must not disable the attack
            images = check_attackable(images)
            if self.quantize:
                check_levels(images)
            if self.epsilon == 0 or len(images) == 0:
                return images.clone()
            generator = check_generator(generator)
            inner, target = self, model
            if self.quantize:
                inner, target = self._quantized(model)
                if inner.epsilon == 0:
                    return images.clone()
            if start is not None:
                start = inner.clip_to_budget(images, _check_start(start, images))
            with frozen(model):
                adversarial = inner.run(target, images.clone(), labels, generator, start).detach()
            if adversarial.shape != images.shape:
                raise ValueError(
                    f"{type(self).__name__}.run returned {tuple(adversarial.shape)} for {tuple(images.shape)}"
                )
            adversarial = images + (adversarial - images).nan_to_num(0.0)
            if self.quantize:
                return round_within_budget(images, adversarial, self.epsilon, self.norm)
            return self.clip_to_budget(images, adversarial)

    def clip_to_budget(self, images: Tensor, moved: Tensor) -> Tensor:
        """``moved`` projected into the budget around ``images`` and clamped to [0, 1]."""
        return (images + project(moved - images, self.epsilon, self.norm)).clamp(0, 1)

    def still_correct(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        """(B,) bool: whether the attack has failed on each image, by its own criterion of success."""
        with torch.no_grad(), frozen(model):
            right = model(images).argmax(-1) == labels
        return right if right.ndim == 1 else right.flatten(0, -2).any(0)

    def _quantized(self, model: Model) -> tuple[Self, Model]:
        """The same attack on a model that sees rounded images, so that success is judged on what is stored.

        The L-inf budget is rounded down to a multiple of 1 / 255, so that rounding never leaves it.
        """
        whole = math.floor(self.epsilon * 255 + 1e-4) / 255 if self.norm == "linf" else self.epsilon
        return replace(self, epsilon=whole, quantize=False), lambda images: model(bpda(_round_to_levels)(images))

    @abstractmethod
    def run(
        self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        """Adversarial images (B, 3, H, W); :meth:`__call__` projects them into the budget again."""


def _check_start(start: Tensor, images: Tensor) -> Tensor:
    start = check_attackable(start)
    if start.shape != images.shape:
        raise ValueError(f"start: expected one start for each image, {tuple(images.shape)}, got {tuple(start.shape)}")
    return start.to(images)
