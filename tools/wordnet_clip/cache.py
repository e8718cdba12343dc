"""Caches fixed views of images at the output of the tower's lower blocks, which are not tuned."""

from __future__ import annotations

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
PART = 200  # images of a file, so that a killed run loses little


@dataclass
class Cached:
    """Views of one set.

    Attributes:
        middle: (N, V, C, h, w) fp16, the output of the lower blocks. features: (N, 1280), the original network's, of
            the first view. labels: (N,).
    """

    middle: Tensor
    features: Tensor
    labels: Tensor


@torch.no_grad()
def cache(images: Images, teacher: Teacher, side: int, views: int, folder: Path, seed: int) -> Cached:
    """Computes what is missing in ``folder`` and reads the rest.

    Args:
        images: of one set. teacher: the original network. side: of the images as the tower sees them.
        views: the first as it is, the second cropped, the third cropped and degraded, and so on.
        folder: of this set's parts. seed: of the crops.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, start in enumerate(tqdm(range(0, len(images.labels), PART), desc=folder.name, mininterval=20)):
        path = folder / f"{number:04d}.safetensors"
        if not path.is_file():
            pixels = images.pixels[start : start + PART].float() / 255
            generator = torch.Generator().manual_seed(seed * 100_003 + number)
            write_tensors(path, _part(pixels, teacher, side, views, generator))
        parts.append(read_tensors(path)[0])
    return Cached(
        torch.cat([part["middle"] for part in parts]), torch.cat([part["features"] for part in parts]), images.labels
    )


def _part(pixels: Tensor, teacher: Teacher, side: int, views: int, generator: torch.Generator) -> dict[str, Tensor]:
    shown = [to_side(pixels, side)]
    for view in range(1, views):
        cropped = Crops.draw(len(pixels), generator)(pixels, side)
        detail = int(torch.randint(28, 72, (1,), generator=generator))
        shown.append(degrade(cropped, detail) if view % 2 == 0 else cropped)
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
