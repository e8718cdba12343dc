"""Changes the image size of a loaded encoder.

``KIND:NAME?image_size=96`` is the same encoder at 96 pixels. The size is part of the source, so that it is stored and
loaded with everything that names the encoder: configurations of defended models, tuned encoders, reports.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from zepad_mm.encoders.build_limits import ForwardLimit


def set_image_size(encoder: Any, image_size: int) -> None:
    """Changes an encoder's image size in place: its preprocessing, and position embeddings where it has any.

    Convolutional towers take any size; position embeddings of ViTs are interpolated.

    Raises:
        ValueError: the tower takes only its own size, or the size is no multiple of its patches.
    """
    preprocess = encoder.preprocess
    if image_size == preprocess.image_size:
        return
    try:
        resize_tower(encoder.backbone, image_size)
        with torch.no_grad(), ForwardLimit(encoder.backbone, encoder.source):
            parameter = next(encoder.parameters())
            images = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
            width = encoder.backbone.eval()(images).shape[-1]
    except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{encoder.source} takes images of {preprocess.image_size} pixels, not of {image_size}: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    if width != encoder.feature_dim:
        raise ValueError(f"{encoder.source} gives {width} features at {image_size} pixels, not {encoder.feature_dim}")
    scaled = preprocess.resize_size and max(
        image_size, round(preprocess.resize_size * image_size / preprocess.image_size)
    )
    encoder.preprocess = replace(preprocess, image_size=image_size, resize_size=scaled)


def resize_tower(tower: nn.Module, image_size: int) -> None:
    """Adapts the position embedding of a tower, or of the network directly inside it, if it has one of a known kind."""
    for module in (tower, *tower.children()):
        if resize_positions(module, image_size):
            return


def resize_positions(module: Any, image_size: int) -> bool:
    """Adapts the position embedding of a module; False where it has none of a known kind."""
    if callable(getattr(module, "set_image_size", None)):  # HFBackbone
        module.set_image_size(image_size)
        return True
    if hasattr(module, "trunk"):  # open_clip's wrapper of timm
        return resize_positions(module.trunk, image_size)
    if callable(getattr(module, "set_input_size", None)):  # timm
        module.set_input_size(img_size=(image_size, image_size))
        return True
    if isinstance(getattr(module, "positional_embedding", None), nn.Parameter) and hasattr(module, "grid_size"):
        _resize_open_clip(module, image_size)
        return True
    return False


def _resize_open_clip(tower: Any, image_size: int) -> None:
    patch = tower.patch_size[0]
    if image_size % patch:
        raise ValueError(f"expected a multiple of its patches of {patch} pixels")
    grid, embedding = image_size // patch, tower.positional_embedding.detach()
    extra = len(embedding) - tower.grid_size[0] * tower.grid_size[1]
    places = embedding[extra:].reshape(1, *tower.grid_size, -1).permute(0, 3, 1, 2)
    places = F.interpolate(places, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    places = places.permute(0, 2, 3, 1).reshape(grid * grid, -1)
    tower.positional_embedding = nn.Parameter(torch.cat([embedding[:extra], places]))
    tower.grid_size, tower.image_size = (grid, grid), (image_size, image_size)
