"""Wrappers for models that are random (EOT) or have steps without a gradient (BPDA)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]


def eot(model: Model, passes: int = 20, seed: int = 0) -> Model:
    """Expectation over transformation (Athalye et al. 2018): outputs, and so gradients, averaged over forward passes.

    The global random state is seeded from ``seed`` and the pixels, and restored afterwards: a repeated batch gets the
    same draws, each iterate of an attack gets new ones. A model that draws from its own generator is not affected.

    Args:
        model: (B, 3, H, W) to outputs, random at each call.
        passes: forward passes to average.
        seed: seed of the draws.

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
    """The bits of the sum of all pixels, as an integer that changes with any pixel."""
    return int(struct.unpack("<q", struct.pack("<d", float(images.detach().double().sum())))[0]) >> 1


class _StraightThrough(torch.autograd.Function):
    """Returns one tensor and passes the gradient to another of the same shape."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def bpda(function: Model, surrogate: Model | None = None) -> Model:
    """Backward pass differentiable approximation (Athalye et al. 2018).

    The forward pass is ``function``, bit for bit; the backward pass is that of ``surrogate``. Wrap the step that has no
    gradient (rounding, JPEG, a hard gate), or a whole model with a smooth substitute.

    Args:
        function: the exact step; need not be differentiable.
        surrogate: a differentiable substitute with the same output shape; None: the identity.

    Raises:
        ValueError: when called, if the two outputs differ in shape.
    """

    def approximated(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            exact = function(inputs)
        smooth = inputs if surrogate is None else surrogate(inputs)
        if smooth.shape != exact.shape:
            raise ValueError(
                f"bpda: the function gives {tuple(exact.shape)} and its surrogate {tuple(smooth.shape)}; "
                "pass one with the same output shape: bpda(function, surrogate=...)"
            )
        return _StraightThrough.apply(smooth, exact)  # type: ignore[no-any-return, no-untyped-call]

    return approximated
