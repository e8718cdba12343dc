"""Spatial features of an encoder: patch tokens of a transformer, positions of the last feature map of a CNN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm.encoders.base import Encoder


class SpatialFeatures(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to the last spatial features of an encoder (T, B, D), differentiable.

    They are what the last module puts out that has more than one position: tokens (B, T, D) or a map (B, D, h, w). It
    is found once, by one forward pass on images of the side that the encoder was made for.

    Raises:
        ValueError: no module of the encoder has spatial outputs.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self._source = _last_spatial_module(encoder)

    def forward(self, images: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = self._source.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            self.encoder(images)
        finally:
            handle.remove()
        return _as_tokens(kept[-1], len(images))


def _last_spatial_module(encoder: Encoder) -> nn.Module:
    found: list[nn.Module] = []
    batch = 3  # unlike the number of positions along a side

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and _is_spatial(output, batch):
            found.append(module)

    handles = [part.register_forward_hook(after) for part in encoder.backbone.modules()]
    like = next(encoder.parameters())
    side = encoder.preprocess.image_size
    try:
        with torch.no_grad():
            encoder(torch.zeros(batch, 3, side, side, device=like.device))
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(f"{encoder.source}: no module has patch tokens or a feature map among its outputs")
    return found[-1]


def _is_spatial(output: Tensor, batch: int) -> bool:
    if len(output) != batch:
        return False
    if output.ndim == 4:
        return output.shape[-1] * output.shape[-2] > 1
    return output.ndim == 3 and output.shape[1] > 1


def _as_tokens(output: Tensor, batch: int) -> Tensor:
    tokens = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
    return tokens.transpose(0, 1)
