"""The training images: packed once into one small file, decoded, cropped and degraded."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tools.wordnet_clip.names import NEVER_READ
from zepad_mm.utils.io import ASSETS, replacing

SIDE = 128  # images are packed at this side or their own, if that is smaller
QUALITY = 80  # WebP
# set -> images of a class for training, and from its train split for validation (0: it has a validation split)
PACKED = {"imagenet20": (460, 40), "tinyimagenet80": (145, 15), "caltech69": (1000, 0), "clothing": (1000, 0)}
NEVER_SEEN = 30  # images of each class that is never read, for validation


@dataclass
class Images:
    """Images of one set and part: (N, 3, S, S) uint8, (N,) labels and the names behind them."""

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]


def class_names(data_root: Path, source: str) -> tuple[str, ...]:
    """Class names of a set, from its parquet schema."""
    schema = pq.read_schema(_files(data_root, source, "train")[0])
    names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    return tuple(names)


def pack(data_root: Path, path: Path) -> None:
    """Writes the images of training and validation as WebP into one parquet file.

    Columns: source, part ("train", "validation" or "never_read", the classes that no text names), label, image.
    """
    rows: dict[str, list[Any]] = {"source": [], "part": [], "label": [], "image": []}
    for source, (train, held) in PACKED.items():
        names = class_names(data_root, source)
        never = {label for label, name in enumerate(names) if name in NEVER_READ.get(source, ())}
        table = _read(data_root, source, "surrogate" if source == "clothing" else "train")
        seen = [0] * len(names)
        order = np.random.default_rng(0).permutation(len(table))
        for index in order.tolist():
            image, label = table[index]
            seen[label] += 1
            if label in never:
                part = "never_read" if seen[label] <= NEVER_SEEN else None
            elif seen[label] <= held:
                part = "validation"
            else:
                part = "train" if seen[label] <= held + train else None
            if part is not None:
                _append(rows, source, part, label, image)
        if held == 0:
            for image, label in _read(data_root, source, "validation"):
                _append(rows, source, "never_read" if label in never else "validation", label, image)
    with replacing(path) as temporary:
        pq.write_table(pa.table(rows), temporary, compression="none")


def unpack(path: Path, data_root_names: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Images]]:
    """The packed images as tensors: part -> source -> images."""
    table = pq.read_table(path).to_pydict()
    with ThreadPoolExecutor(8) as pool:
        pixels = list(pool.map(_decode, table["image"]))
    found: dict[str, dict[str, list[int]]] = {}
    for row, (source, part) in enumerate(zip(table["source"], table["part"], strict=True)):
        found.setdefault(part, {}).setdefault(source, []).append(row)
    labels = torch.tensor(table["label"])
    return {
        part: {
            source: Images(torch.stack([pixels[row] for row in rows]), labels[rows], data_root_names[source])
            for source, rows in sources.items()
        }
        for part, sources in found.items()
    }


def to_side(pixels: Tensor, side: int) -> Tensor:
    """(B, 3, S, S) in [0, 1] at another side, as the encoder does it."""
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


@dataclass
class Crops:
    """Random crops, flips and changes of colour of a batch."""

    theta: Tensor
    brightness: Tensor
    contrast: Tensor
    grey: Tensor

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> Crops:
        """Zoom in by up to 1.8 with some change of aspect, mirrored half the time."""
        draw = torch.rand(n, 8, generator=generator)
        zoom = 1 - 0.45 * draw[:, :1] ** 1.5
        aspect = torch.exp((draw[:, 1:2] - 0.5) * 0.3)
        sides = torch.cat([zoom * aspect, zoom / aspect], 1).clamp(max=1)
        shift = (draw[:, 2:4] * 2 - 1) * (1 - sides)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0] = sides[:, 0] * torch.where(draw[:, 4] < 0.5, -1.0, 1.0)
        theta[:, 1, 1] = sides[:, 1]
        theta[:, :, 2] = shift
        return cls(theta, 0.75 + 0.5 * draw[:, 5], 0.75 + 0.5 * draw[:, 6], draw[:, 7] < 0.05)

    def __call__(self, pixels: Tensor, side: int) -> Tensor:
        """(B, 3, S, S) in [0, 1] to (B, 3, side, side) in [0, 1]."""
        theta = self.theta.to(pixels.device)
        grid = F.affine_grid(theta, [len(pixels), 3, side, side], align_corners=False)
        moved = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        shape = (-1, 1, 1, 1)
        middle = moved.mean((1, 2, 3), keepdim=True)
        moved = (moved - middle) * self.contrast.to(pixels.device).view(shape) + middle
        moved = moved * self.brightness.to(pixels.device).view(shape)
        grey = self.grey.to(pixels.device).view(shape)
        return torch.where(grey, moved.mean(1, keepdim=True), moved).clamp(0, 1)


def degrade(pixels: Tensor, side: int) -> Tensor:
    """The images with the detail that ``side`` pixels hold."""
    return to_side(to_side(pixels, side), pixels.shape[-1])


def _append(rows: dict[str, list[Any]], source: str, part: str, label: int, image: Image.Image) -> None:
    buffer = io.BytesIO()
    side = min(SIDE, image.size[0])
    image = image.convert("RGB")
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    image.save(buffer, "WEBP", quality=QUALITY, method=4)
    for name, value in zip(rows, (source, part, label, buffer.getvalue()), strict=True):
        rows[name].append(value)


def _decode(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def _read(data_root: Path, source: str, split: str) -> list[tuple[Image.Image, int]]:
    rows: list[tuple[Image.Image, int]] = []
    for file in _files(data_root, source, split):
        table = pq.read_table(file)
        for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
            rows.append((Image.open(io.BytesIO(image["bytes"])), label))
    return rows


def _files(data_root: Path, source: str, split: str) -> list[Path]:
    folder = ASSETS / "clothing" if source == "clothing" else data_root / source
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise SystemExit(f"no {split}-*.parquet in {folder}; give --data-root the folder of the parquet sets")
    return files
