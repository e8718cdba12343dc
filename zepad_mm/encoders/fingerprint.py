"""Fingerprints: features of fixed images, stored with an encoder and compared when it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from zepad_mm.encoders.base import Encoder, Preprocess
from zepad_mm.utils.config import Config

KEPT = 16  # features of each image
SAME = 1e-4  # of the largest feature: other hardware moves features by less
ACTIVATION = re.compile(r"gelu|relu|silu|swish|mish|tanh|sigmoid", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Fingerprint(Config):
    """Features of two fixed images, with the preprocessing and activations behind them."""

    features: tuple[float, ...]  # of an image that has the encoder's own size: weights, activations, mean and std
    resized: tuple[float, ...]  # of one that has not: interpolation and crop as well
    preprocess: Preprocess
    activations: tuple[str, ...]  # classes of the activation functions that are modules


def _test_image(height: int, width: int) -> Tensor:
    """A colour gradient with waves, (1, 3, height, width) in [0, 1]."""
    rows, columns = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width)
    waves = ((rows * 9).sin() * (columns * 14).cos()).abs()
    return torch.stack([rows * columns, 1 - rows.expand(height, width), waves])[None]


@torch.no_grad()
def fingerprint(encoder: Encoder) -> Fingerprint:
    """The fingerprint of an encoder in eval mode; its modes are restored."""
    size = encoder.preprocess.image_size
    like = next(encoder.parameters())
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    rows = [
        encoder(_test_image(*shape).to(like.device, like.dtype))[0, :KEPT].tolist()
        for shape in ((size, size), (size + size // 3, size + size // 2))
    ]
    for module, mode in modes.items():
        module.training = mode
    names = {type(module).__name__ for module in encoder.modules() if ACTIVATION.search(type(module).__name__)}
    return Fingerprint(
        features=tuple(round(value, 6) for value in rows[0]),
        resized=tuple(round(value, 6) for value in rows[1]),
        preprocess=encoder.preprocess,
        activations=tuple(sorted(names)),
    )


def differences(saved: Fingerprint, encoder: Encoder, tolerance: float = 1e-2) -> list[str]:
    """What changed since ``saved``, in words; empty while the encoder answers the same.

    Args:
        saved: from :func:`fingerprint`.
        encoder: as it is now.
        tolerance: of the features, as a part of the largest, where nothing else changed: above rounding to half
            precision. A named change counts as soon as it moves a feature by 1e-4 of the largest.
    """
    now = fingerprint(encoder)
    pairs = ((saved.features, now.features), (saved.resized, now.resized))
    if all(_close(*pair, SAME) for pair in pairs):
        return []
    causes = [
        f"{field.name} was {getattr(saved.preprocess, field.name)} and is {getattr(now.preprocess, field.name)}"
        for field in fields(Preprocess)
        if getattr(saved.preprocess, field.name) != getattr(now.preprocess, field.name)
    ]
    if saved.activations != now.activations:
        was, is_ = (" and ".join(names) or "unknown" for names in (saved.activations, now.activations))
        causes.append(f"the activation was {was} and is {is_}")
    if causes or all(_close(*pair, tolerance) for pair in pairs):
        return causes
    if _close(*pairs[0], tolerance):
        return ["images are resized differently (another version of torch?)"]
    return ["the weights differ, or the code of the library that runs them"]


def describe_changes(saved: dict[str, Any], encoders: Mapping[str, Encoder]) -> str:
    """:func:`differences` of several encoders by name, in one line; empty while all answer the same."""
    found = {name: differences(Fingerprint.from_dict(about), encoders[name]) for name, about in saved.items()}
    return "; ".join(f"in branch {name} {', '.join(causes)}" for name, causes in found.items() if causes)


def _close(saved: tuple[float, ...], now: tuple[float, ...], tolerance: float) -> bool:
    if len(saved) != len(now):
        return False
    a, b = torch.tensor(saved), torch.tensor(now)
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6))
