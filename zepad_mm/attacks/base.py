"""The contract of every per-sample attack, and the two norms."""

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
    """Eval mode and no parameter gradients while an attack looks at a model; everything is put back afterwards.

    Works on modules, on bound methods of modules, and on functions and partials that refer to modules by name. Modules
    hidden deeper (in lists, in attributes of other objects) are left as they are.
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
    """The modules that a callable runs, as far as it shows them; wrappers around callables are looked into.

    Args:
        seen: ids of what was looked into already, since functions may refer to themselves and to each other.
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

    A patch holds pixels, so that its pixels are brought to [0, 1]; its area is kept where it is pasted.
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
    # scaled by its largest entry first: the squares of a saturated model's gradient underflow
    gradient = gradient / gradient.flatten(1).abs().amax(1)[:, None, None, None].clamp_min(1e-37)
    return gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-12)


def resize_delta(delta: Tensor, size: tuple[int, int], epsilon: float, norm: str) -> Tensor:
    """A universal (3, h, w) resized to images of ``size`` (H, W), inside the budget again."""
    if (delta.shape[-2], delta.shape[-1]) == size:
        return delta
    return project(F.interpolate(delta[None], size, mode="bilinear", align_corners=False)[0], epsilon, norm)


def _round_to_levels(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


def check_levels(images: Tensor) -> None:
    """Raises ValueError for images that are not of whole levels k / 255."""
    off = float((images * 255 - (images * 255).round()).abs().max()) if images.numel() else 0.0
    if off > 1e-3:
        raise ValueError(
            f"images: expected whole levels k / 255, as 8-bit images have, got values {off:.2g} levels beside; "
            "write (images * 255).round() / 255 first"
        )


def round_within_budget(images: Tensor, moved: Tensor, epsilon: float, norm: str) -> Tensor:
    """``moved`` on whole levels k / 255 and inside the budget around ``images``, which are of whole levels.

    L2 perturbations that rounding carried outside are shrunk, by bisection, until what is rounded fits.
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
    """Raises ValueError for an unknown norm, or an epsilon outside [0, 1] (L-inf, patch) or below 0 (L2)."""
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
    """The generator, or a CPU one seeded with ``seed``. Raises ValueError for a generator on another device."""
    if generator is None:
        return seeded_generator(seed)
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator: expected a CPU generator, got one on {generator.device}; attacks draw on the CPU so that a "
            "seed gives the same result on every device: torch.Generator().manual_seed(0)"
        )
    return generator


def check_attackable(images: Tensor) -> Tensor:
    """The images without their history, if they are float32 or float64 pixels in [0, 1]."""
    images = check_images(images.detach() if isinstance(images, Tensor) else images)
    if images.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"images: an attack needs float32 pixels, got {images.dtype}, whose rounding is as coarse as the "
            "budget; write images.float() and run the model under torch.autocast"
        )
    return images.clone() if images.is_inference() else images


def random_delta(like: Tensor, epsilon: float, norm: str, generator: torch.Generator | None) -> Tensor:
    """Uniform in the L-inf box; for L2 uniform direction and uniform radius. Drawn on the CPU: same on any device."""
    noise = torch.empty(like.shape, dtype=like.dtype)
    if norm == "linf":
        return noise.uniform_(-epsilon, epsilon, generator=generator).to(like.device)
    noise.normal_(generator=generator)
    radius = torch.empty(len(like), 1, 1, 1, dtype=like.dtype).uniform_(0, epsilon, generator=generator)
    return (steepest(noise, "l2") * radius).to(like.device)


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A per-sample attack inside a budget. Immutable; its repr names it in tests and records."""

    norms: ClassVar[tuple[str, ...]] = NORMS  # the norms it knows

    epsilon: float = 4 / 255  # budget in pixels of [0, 1]
    norm: str = "linf"  # "linf" or "l2"
    quantize: bool = False  # True: images of whole levels k / 255 only, as a file of 8 bits holds them

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
        """Attacked images: same shape, inside the budget and [0, 1], whatever the sub-class did.

        Args:
            model: maps (B, 3, H, W) in [0, 1] to logits or features.
            images: (B, 3, H, W) in [0, 1].
            labels: (B,) true classes, for losses on logits.
            generator: source of all randomness; a fixed seed 0 when None. The global RNG is never touched.
            start: (B, 3, H, W) images to set out from, e.g. transferred ones; brought into the budget first. Further
                restarts begin at random.

        Raises:
            ValueError: images, labels or outputs of the wrong shape or range; with ``quantize``, images of more
                than 8 bits.
        """
        with torch.inference_mode(False), torch.enable_grad():  # a caller's no_grad must not turn an attack off
            images = check_attackable(images)
            if self.quantize:
                check_levels(images)
            if self.epsilon == 0 or len(images) == 0:
                return images.clone()
            generator = check_generator(generator)
            inner, seen = self, model
            if self.quantize:
                inner, seen = self._quantized(model)
                if inner.epsilon == 0:
                    return images.clone()
            if start is not None:
                start = inner.clip_to_budget(images, _check_start(start, images))
            with frozen(model):
                attacked = inner.run(seen, images.clone(), labels, generator, start).detach()
            if attacked.shape != images.shape:
                raise ValueError(f"{type(self).__name__}.run gave {tuple(attacked.shape)} for {tuple(images.shape)}")
            attacked = images + (attacked - images).nan_to_num(0.0)
            return (
                round_within_budget(images, attacked, self.epsilon, self.norm)
                if self.quantize
                else self.clip_to_budget(images, attacked)
            )

    def clip_to_budget(self, images: Tensor, moved: Tensor) -> Tensor:
        """``moved`` brought back into the budget around ``images`` and into [0, 1]."""
        return (images + project(moved - images, self.epsilon, self.norm)).clamp(0, 1)

    def still_correct(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        """(B,) bool: does the defence still stand on these images, as this attack counts success?"""
        with torch.no_grad(), frozen(model):
            right = model(images).argmax(-1) == labels
        return right if right.ndim == 1 else right.flatten(0, -2).any(0)

    def _quantized(self, model: Model) -> tuple[Self, Model]:
        """The same attack on a model that sees rounded images, so that success is judged on what will be stored.

        With an L-inf budget of whole levels, rounding never leaves the budget.
        """
        whole = math.floor(self.epsilon * 255 + 1e-4) / 255 if self.norm == "linf" else self.epsilon
        return replace(self, epsilon=whole, quantize=False), lambda images: model(bpda(_round_to_levels)(images))

    @abstractmethod
    def run(
        self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        """The attack itself; what it returns is projected again, so a sloppy one cannot cheat."""


def _check_start(start: Tensor, images: Tensor) -> Tensor:
    start = check_attackable(start)
    if start.shape != images.shape:
        raise ValueError(f"start: expected one image for each image, {tuple(images.shape)}, got {tuple(start.shape)}")
    return start.to(images)
