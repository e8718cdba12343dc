"""Random changes of training images, on their device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST_AREA = 0.35  # of the crop of a "photo"
LARGEST_CHANGE = 0.3  # of its brightness, contrast and colour
LESS_SHARP = 0.3  # share of the photos that are made smaller and then larger
LOWEST_SIDE = 0.35  # the smaller side, relative to the image's


def augment(images: Tensor, kind: str, generator: torch.Generator, share: slice) -> Tensor:
    """Random changes (see ``TrainSettings.augment``) of one process's images (B, 3, H, W) of a global batch.

    Drawn for the whole global batch, so that an image is augmented alike for every number of processes.

    Args:
        share: the rows of the global batch that ``images`` are.
    """
    if kind == "none":
        return images
    size = share.stop
    if kind == "photo":
        return _photo(
            images, torch.rand(size, 10, generator=generator)[share], float(torch.rand(1, generator=generator))
        )
    flips = (torch.rand(size, generator=generator) < 0.5)[share].to(images.device)
    images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    if kind == "flip":
        return images
    height, width = images.shape[-2:]
    pad = max(1, min(height, width) // 8)
    shifts = torch.randint(0, 2 * pad + 1, (size, 2), generator=generator)[share].to(images.device)
    padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")
    rows = shifts[:, :1] + torch.arange(height, device=images.device)
    columns = shifts[:, 1:] + torch.arange(width, device=images.device)
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[batch, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _photo(images: Tensor, draw: Tensor, sharpness: float) -> Tensor:
    """Flipped and cropped to a random area, half of them recoloured, some with the detail of a smaller image.

    Args:
        images: (B, 3, H, W) in [0, 1].
        draw: (B, 10) in [0, 1), on the CPU, as all choices are: none of them waits for the GPU.
        sharpness: in [0, 1), of the less sharp ones: one side for the batch.
    """
    blurred = (draw[:, 9] < LESS_SHARP).nonzero().flatten().to(images.device)
    if len(blurred):
        sides = [round(side * (LOWEST_SIDE + (0.9 - LOWEST_SIDE) * sharpness)) for side in images.shape[-2:]]
        smaller = F.interpolate(images[blurred], sides, mode="bicubic", antialias=True)
        images = images.index_copy(0, blurred, F.interpolate(smaller, images.shape[-2:], mode="bicubic"))
    grid = F.affine_grid(_crops(draw).to(images), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    strength = torch.where(draw[:, 5] < 0.5, LARGEST_CHANGE, 0.0)[:, None]
    factors = (1 + strength * (2 * draw[:, 6:9] - 1)).to(images).view(-1, 3, 1, 1, 1).unbind(1)
    brightness, contrast, colour = factors
    grey = moved.mean(1, keepdim=True)
    moved = grey + colour * (moved - grey)
    middle = grey.mean((2, 3), keepdim=True)
    return (brightness * (middle + contrast * (moved - middle))).clamp(0, 1)


def _crops(draw: Tensor) -> Tensor:
    """(B, 2, 3) affine maps: a random part of the image, at most 4:3, half of them mirrored."""
    area = LOWEST_AREA + (1 - LOWEST_AREA) * draw[:, 0].sqrt()
    ratio = torch.exp((draw[:, 1] - 0.5) * math.log(4 / 3))
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp_max(1)
    theta = torch.zeros(len(draw), 2, 3)
    theta[:, 0, 0] = sides[:, 0] * torch.where(draw[:, 4] < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = sides[:, 1]
    theta[:, :, 2] = (2 * draw[:, 2:4] - 1) * (1 - sides)
    return theta
