"""Caches fixed views of images at the output of the tower's lower blocks, which are not tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tools.wordnet_clip.images import Crops, Images, degrade, to_side
from tools.wordnet_clip.model import Teacher, normalise
from zepad_mm.utils.io import read_tensors, write_tensors

LOWER = 5  # blocks that are not tuned
DETAIL = (24, 72)  # pixels of detail in a degraded view
SMALL = 32  # pixels of detail in the second view of a validation image
PART = 200  # images of a file, so that a killed run loses little


@dataclass
class Cached:
    """Views of one set.

    Attributes:
        middle: (N, V, C, h, w) fp16, the output of the lower blocks. features: (N, 1280), the original network's, of
            the first view, both on the network's device. labels: (N,).
    """

    middle: Tensor
    features: Tensor
    labels: Tensor


# pixels (B, 3, S, S) in [0, 1] to its views, each (B, 3, side, side)
Views = Callable[[Tensor, torch.Generator], list[Tensor]]


@torch.no_grad()
def cache(images: Images, teacher: Teacher, views: Views, folder: Path, seed: int) -> Cached:
    """Computes what is missing in ``folder`` and reads the rest.

    Args:
        images: of one set. teacher: the original network. views: of each image; the first is the image as it is.
        folder: of this set's parts. seed: of the views.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = teacher.rows.device
    parts = []
    for number, start in enumerate(tqdm(range(0, len(images.labels), PART), desc=folder.name, mininterval=20)):
        path = folder / f"{number:04d}.safetensors"
        if not path.is_file():
            pixels = images.pixels[start : start + PART].to(device).float() / 255
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            write_tensors(path, _part(views(pixels, generator), teacher))
        parts.append(read_tensors(path)[0])
    middle, features = (torch.cat([part[key] for part in parts]).to(device) for key in ("middle", "features"))
    return Cached(middle, features, images.labels)


def training_views(side: int, count: int) -> Views:
    """The image as it is, then crops of it; every second crop loses detail."""

    def views(pixels: Tensor, generator: torch.Generator) -> list[Tensor]:
        shown = [to_side(pixels, side)]
        for view in range(1, count):
            cropped = Crops.draw(len(pixels), generator)(pixels, side)
            detail = int(torch.randint(*DETAIL, (1,), generator=generator))
            shown.append(degrade(cropped, detail) if view % 2 == 0 else cropped)
        return shown

    return views


def validation_views(side: int) -> Views:
    """The image as it is, and with the detail of a very small image."""
    return lambda pixels, generator: [to_side(pixels, side), degrade(to_side(pixels, side), SMALL)]


def _part(shown: list[Tensor], teacher: Teacher) -> dict[str, Tensor]:
    middle = torch.stack([torch.cat([lower(teacher.network, part) for part in view.split(50)]) for view in shown], 1)
    return {"middle": middle.half(), "features": upper(teacher.network, middle[:, 0])}


def lower(network: Any, pixels: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] to the output of the lower blocks."""
    found: Tensor = network.blocks[:LOWER](network.bn1(network.conv_stem(normalise(pixels))))
    return found


def upper(network: Any, middle: Tensor) -> Tensor:
    """The output of the lower blocks to pooled features (B, 1280)."""
    middle = middle.float().contiguous(memory_format=torch.channels_last)
    deep = network.blocks[LOWER:](middle)
    found: Tensor = network.global_pool(network.bn2(network.conv_head(deep)))
    return found
