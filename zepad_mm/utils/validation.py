"""Checks of user input. Each error says what was given, what was expected and how to write it right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_images(images: Tensor) -> Tensor:
    """The images, if they are a (B, 3, H, W) float tensor of finite pixels in [0, 1].

    The range is not looked at again for tensors that ask for a gradient: those are made inside attack loops, which
    checked their input once and clamp every step; on a GPU the look would cost a synchronisation per step.

    Raises:
        TypeError: not a tensor. ValueError: wrong shape, dtype, range, or NaN.
    """
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images: expected a torch.Tensor of shape (B, 3, H, W), got {type(images).__name__}; "
            "for PIL images use zepad_mm.data.to_tensor or RobustZeroShotClassifier"
        )
    if images.ndim == 4 and images.shape[1] != 3 and images.shape[3] == 3:
        raise ValueError(
            f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}, colour last; "
            "write images.permute(0, 3, 1, 2)"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images: expected shape (B, 3, H, W), got {tuple(images.shape)}; add a batch axis with images[None], "
            "repeat the channel of grey images with images.expand(-1, 3, -1, -1), drop alpha with images[:, :3]"
        )
    if not images.is_floating_point():
        raise ValueError(f"images: expected floats in [0, 1], got {images.dtype}; write images.float() / 255")
    if images.numel() == 0 or images.requires_grad or torch.compiler.is_compiling():
        return images
    if images.is_meta or images.layout != torch.strided:
        what = "without values" if images.is_meta else f"of {images.layout}; write images.to_dense()"
        raise ValueError(f"images: expected a dense tensor with values, got one on {images.device}, {what}")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # also true for NaN, which compares false
        fix = "write images / 255" if high > 2 else "hand in raw pixels: the encoder normalises inside"
        if not math.isfinite(low) or not math.isfinite(high):
            fix = "the input holds NaN or infinity; look for a division by zero before this call"
        raise ValueError(f"images: expected pixels in [0, 1], got values from {low:.4g} to {high:.4g}; {fix}")
    return images


def check_labels(labels: Tensor | None, images: Tensor) -> Tensor:
    """The labels as int64 beside the images, if they are one class index for each.

    Raises:
        ValueError: missing, another shape, no integers, or negative.
    """
    if labels is None:
        raise ValueError("labels: this loss needs the true labels, a (B,) integer tensor; got None")
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: expected a tensor, got {type(labels).__name__}; write torch.as_tensor(labels)")
    if labels.ndim != 1 or len(labels) != len(images) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: expected a ({len(images)},) integer tensor, got {tuple(labels.shape)} {labels.dtype}"
        )
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels: expected class indices of at least 0, got {int(labels.min())}")
    return labels.to(images.device, torch.long)


def check_count(value: Any, name: str) -> int:
    """A whole number of at least 1. Raises ValueError for anything else."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r:.100}")
    return int(value)


def check_device(device: str | torch.device | None) -> None:
    """Raise ValueError for a device that torch does not know or that is not there; None is any."""
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch without CUDA
        known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        known += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device: expected one of {', '.join(known)}, got {str(device)!r}") from error


def check_epsilon(epsilon: float, name: str = "epsilon") -> float:
    """A budget in pixels of [0, 1]. Raises ValueError for 8 where 8/255 was meant."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon <= 1:
        raise ValueError(
            f"{name}: expected a number in [0, 1], in pixels of [0, 1], got {epsilon!r}; write 8/255, not 8"
        )
    return float(epsilon)
