"""Around a model: what an attacker does about randomness (EOT) and about steps without a gradient (BPDA)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]


def eot(model: Model, passes: int = 20, seed: int = 0) -> Model:
    """Expectation over transformation (Athalye et al. 2018): outputs, and so gradients, averaged over forward passes.

    Every image batch gets draws of its own, made from ``seed`` and the pixels: two looks at the same batch agree, two
    iterates of an attack do not share their luck. The global random state is left as it was. A model that draws from a
    generator of its own decides for itself.

    Args:
        model: (B, 3, H, W) to outputs, drawing anew at each call.
        passes: forward passes per look.
        seed: source of the draws.

    Raises:
        ValueError: fewer than one pass.
    """
    if passes < 1:
        raise ValueError(f"passes: expected at least 1 forward pass to average over, got {passes}; 20 is usual")

    def averaged(images: Tensor) -> Tensor:
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed ^ _bits(images))
            return torch.stack([model(images) for _ in range(passes)]).mean(0)

    return averaged


def _bits(images: Tensor) -> int:
    """A number that any change of a pixel changes."""
    return int(struct.unpack("<q", struct.pack("<d", float(images.detach().double().sum())))[0]) >> 1


class _StraightThrough(torch.autograd.Function):
    """Goes on with one tensor and sends the gradient to another of the same shape."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def bpda(function: Model, surrogate: Model | None = None) -> Model:
    """Backward pass differentiable approximation (Athalye et al. 2018).

    Forward it is ``function`` to the last bit, backward it is ``surrogate``. Wrap the step that has no gradient
    (rounding, JPEG, a hard gate), or a whole model where a smooth one stands in for it.

    Args:
        function: the step as it is; need not be differentiable.
        surrogate: a smooth stand-in with the same output shape; None: the identity.

    Raises:
        ValueError: when called, if the two disagree in shape.
    """

    def approximated(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            exact = function(inputs)
        smooth = inputs if surrogate is None else surrogate(inputs)
        if smooth.shape != exact.shape:
            raise ValueError(
                f"bpda: the function gives {tuple(exact.shape)} and its surrogate {tuple(smooth.shape)}; "
                "hand in one of the same output shape: bpda(function, surrogate=...)"
            )
        return _StraightThrough.apply(smooth, exact)  # type: ignore[no-any-return, no-untyped-call]

    return approximated
