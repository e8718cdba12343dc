"""The contract of every per-sample attack, and the two norms."""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.checks import check_epsilon, check_images
from zepad_mm.registry import Registry

Model = Callable[[Tensor], Tensor]
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


def modules_of(model: Model) -> list[nn.Module]:
    """The modules that a callable runs, as far as it shows them."""
    if isinstance(model, nn.Module):
        return [model]
    if isinstance(model, functools.partial):
        given = [part for part in (*model.args, *model.keywords.values()) if isinstance(part, nn.Module)]
        return modules_of(model.func) + given
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        return [owner]
    if not inspect.isfunction(model):
        return []
    seen = inspect.getclosurevars(model)
    return [value for value in (*seen.nonlocals.values(), *seen.globals.values()) if isinstance(value, nn.Module)]


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


def fit_delta(delta: Tensor, size: tuple[int, int], epsilon: float, norm: str) -> Tensor:
    """A universal (3, h, w) resized to pictures of ``size`` (H, W), inside the budget again."""
    if (delta.shape[-2], delta.shape[-1]) == size:
        return delta
    return project(F.interpolate(delta[None], size, mode="bilinear", align_corners=False)[0], epsilon, norm)


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
        return torch.Generator().manual_seed(seed)
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
    ) -> Tensor:
        """Attacked images: same shape, inside the budget and [0, 1], whatever the sub-class did.

        Args:
            model: maps (B, 3, H, W) in [0, 1] to logits or features.
            images: (B, 3, H, W) in [0, 1].
            labels: (B,) true classes, for losses on logits.
            generator: source of all randomness; a fixed seed 0 when None. The global RNG is never touched.
        """
        with torch.inference_mode(False), torch.enable_grad():  # a caller's no_grad must not turn an attack off
            images = check_attackable(images)
            if self.epsilon == 0 or len(images) == 0:
                return images.clone()
            generator = check_generator(generator)
            with frozen(model):
                attacked = self.run(model, images.clone(), labels, generator).detach()
            if attacked.shape != images.shape:
                raise ValueError(f"{type(self).__name__}.run gave {tuple(attacked.shape)} for {tuple(images.shape)}")
            delta = project((attacked - images).nan_to_num(0.0), self.epsilon, self.norm)
            return (images + delta).clamp(0, 1)

    @abstractmethod
    def run(self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """The attack itself; what it returns is projected again, so a sloppy one cannot cheat."""
