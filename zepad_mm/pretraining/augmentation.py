"""Random views of image batches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, min_scale: float, generator: torch.Generator, colours: bool = True) -> Tensor:
    """One random view of a batch (B, 3, S, S) in [0, 1]: resized crop, flip, colour jitter, grey; all per sample.

    Crop and flip are one affine sampling, colour jitter is one 3x3 matrix. Parameters are drawn on the CPU, so that a
    seed gives the same views on every device. Without ``colours`` the view is weak: only cropped and flipped.
    """
    n, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=generator)

    area, ratio = uniform(min_scale, 1).sqrt(), uniform(-math.log(4 / 3), math.log(4 / 3)).div(2).exp()
    width, height = (area * ratio).clamp_max(1), (area / ratio).clamp_max(1)
    left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 2], affine[:, 1, 1], affine[:, 1, 2] = width * flip, left, height, top
    grid = F.affine_grid(affine.to(device), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if not colours:
        return views.clamp(0, 1)

    grey = torch.tensor([0.299, 0.587, 0.114])
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    jitter = uniform(0, 1) < 0.8
    angle = torch.where(jitter, uniform(-0.2, 0.2) * math.pi, 0.0)
    saturation = torch.where(uniform(0, 1) < 0.2, 0.0, torch.where(jitter, uniform(0.6, 1.4), 1.0))
    hue_rotation = torch.eye(3).repeat(n, 1, 1)
    hue_rotation[:, 1, 1], hue_rotation[:, 1, 2], hue_rotation[:, 2, 1], hue_rotation[:, 2, 2] = (
        saturation * value for value in (angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    )
    matrix = torch.linalg.inv(to_yiq) @ hue_rotation @ to_yiq
    contrast = torch.where(jitter, uniform(0.6, 1.4), 1.0).to(device).view(-1, 1, 1)
    brightness = torch.where(jitter, uniform(0.6, 1.4), 1.0).to(device).view(-1, 1, 1)
    pixels = matrix.to(device) @ views.flatten(2)
    mean = (grey.to(device) @ pixels).mean(-1).view(-1, 1, 1)
    return (brightness * (contrast * (pixels - mean) + mean)).clamp(0, 1).view_as(images)
