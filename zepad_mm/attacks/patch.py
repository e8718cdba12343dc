"""Adversarial patches: pixels that replace a part of an image; the budget is the share of the area covered."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.base import check_generator

PLACES = ("center", "lower_right", "random")


def check_place(place: str) -> str:
    """The place. Raises ValueError unless it is one of ``PLACES``."""
    if place not in PLACES:
        raise ValueError(f"place: expected one of {PLACES}, got {place!r}")
    return place


def patch_size(size: tuple[int, int], area: float) -> tuple[int, int]:
    """(h, w) of a patch on an image of ``size`` (H, W): the same aspect ratio, at most ``area`` of the pixels."""
    side = math.sqrt(area)
    return int(size[0] * side + 1e-9), int(size[1] * side + 1e-9)  # 1e-9: 0.1 * 10 may come out below 1


def paste(
    images: Tensor, patch: Tensor, area: float, place: str = "lower_right", generator: torch.Generator | None = None
) -> Tensor:
    """Images with the patch pasted on them; differentiable in both.

    Args:
        images: (B, 3, H, W) in [0, 1].
        patch: (3, h, w) in [0, 1]; resized to the size that ``area`` allows.
        area: largest share of the pixels to replace, in [0, 1]; nothing is replaced below one pixel.
        place: "center"; "lower_right", as AdvEncoder and AdvCLIP do; or "random", drawn for each image.
        generator: CPU generator of the random places; seed 0 when None.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    height, width = images.shape[-2:]
    rows, columns = patch_size((height, width), area)
    if rows == 0 or columns == 0:
        return images + 0 * patch.sum()  # keeps the patch in the graph, for attacks that take its gradient
    if patch.shape[-2:] != (rows, columns):
        patch = F.interpolate(patch[None], (rows, columns), mode="bilinear", align_corners=False)[0]
    adversarial = images.clone()
    if check_place(place) != "random":
        free = (height - rows, width - columns)
        top, left = free if place == "lower_right" else (free[0] // 2, free[1] // 2)
        adversarial[..., top : top + rows, left : left + columns] = patch
        return adversarial
    generator = check_generator(generator)
    tops = torch.randint(height - rows + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(width - columns + 1, (len(images),), generator=generator).tolist()
    for index, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        adversarial[index, :, top : top + rows, left : left + columns] = patch
    return adversarial
