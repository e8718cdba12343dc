#!/usr/bin/env python
"""Pack the images that the robust branch is tuned on into one small parquet file.

    python -m tools.pack_images --data-root DIR --out images.parquet
    python -m tools.pack_images --data-root DIR --out exact.parquet --quality 100 --parts gate validation

DIR holds the parquet folders of ``SOURCES``; the clothing photos are the embedded ones, whose test split differs from
that of other packagings. Columns: source, part ("train", "gate" or "validation"), label, image (WebP at most 128 pixels
wide; at quality 100 the file as it is). Every fifth image of a train split is left to the gate, which must see clean
images that the robust branch was not tuned on. The metadata of the schema names the classes of each source. No test
split is read; validation is the split of that name, or the images of the train split that the embedded CLIP was not
trained on either.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tools.wordnet_clip.images import PACKED
from tools.wordnet_clip.names import NEVER_READ
from zepad_mm.utils.io import ASSETS, replacing

PARTS = ("train", "gate", "validation")
SOURCES = ("imagenet20", "tinyimagenet80", "caltech69", "clothing")
TRAIN = {"clothing": ("surrogate", "train")}  # splits that are trained on; "train" of the others
SIDE = 128  # wider images are made as narrow as this
QUALITY = 76  # WebP
AS_IT_IS = 100  # the file itself: a gate that saw compressed images alone takes the detail of others for an attack
GATE = 5  # every so many images of a class are left to the gate
LARGEST = 45.0  # MB of the file
METADATA = b"class_names"


@dataclass(frozen=True)
class Packed:
    """One part: (N, 3, S, S) uint8, (N,) rows in ``class_names``, (N,) rows in ``sources``."""

    pixels: Tensor
    labels: Tensor
    source: Tensor
    class_names: tuple[str, ...]
    sources: tuple[str, ...]  # of the file, which another list of ``SOURCES`` may have made

    def of(self, source: str) -> Packed:
        """The images of one source, under its own class names."""
        rows = self.source == self.sources.index(source)
        found = self.labels[rows].unique()
        names = tuple(self.class_names[row] for row in found.tolist())
        return Packed(
            self.pixels[rows], torch.searchsorted(found, self.labels[rows]), self.source[rows], names, self.sources
        )


def main() -> None:
    """Pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quality", type=int, default=QUALITY, help="of WebP; 100: files as they are")
    parser.add_argument("--largest", type=float, default=LARGEST, help="MB of the file; the rest is left out evenly")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    size = pack(options.data_root, options.out, options.quality, options.largest, options.parts)
    print(f"Written: {options.out}, {size / 1e6:.1f} MB")


def pack(
    data_root: Path,
    path: Path,
    quality: int = QUALITY,
    largest: float = LARGEST,
    parts: Collection[str] = PARTS,
) -> int:
    """Write the images; the bytes of the file. Training images over ``largest`` MB are left out, validation is not."""
    names: dict[str, list[str]] = {}
    rows: list[tuple[str, str, int, bytes]] = []
    for source in SOURCES:
        names[source] = _class_names(data_root, source)
        rows += _rows(data_root, source, len(names[source]), quality, parts)
    rows = _thinned(rows, 1e6 * largest)
    table = pa.table(
        {
            key: [row[column] for row in rows]
            for column, key in enumerate(("source", "part", "label", "image"))
        }
    ).replace_schema_metadata({METADATA: json.dumps(names)})  # fmt: skip
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="none", use_dictionary=["source", "part", "label"])
    return path.stat().st_size


def unpack(path: Path, part: str, side: int = SIDE) -> Packed:
    """One part in memory, every image at ``side``; equal class names of two sources are one class."""
    table = pq.read_table(path, filters=[("part", "=", part)])
    found = json.loads(pq.read_schema(path).metadata[METADATA])
    names = sorted({name for known in found.values() for name in known})
    rows = {source: [names.index(name) for name in known] for source, known in found.items()}
    sources, labels = table["source"].to_pylist(), table["label"].to_pylist()
    with ThreadPoolExecutor() as pool:
        pixels = list(pool.map(_decode, table["image"].to_pylist()))
    joined = torch.empty(len(pixels), 3, side, side, dtype=torch.uint8)
    for width in {image.shape[-1] for image in pixels}:
        where = torch.tensor([row for row, image in enumerate(pixels) if image.shape[-1] == width])
        for few in where.split(512):
            joined[few] = _to_side(torch.stack([pixels[row] for row in few.tolist()]), side)
    label = torch.tensor([rows[source][label] for source, label in zip(sources, labels, strict=True)])
    number = torch.tensor([list(found).index(source) for source in sources])
    return Packed(joined, label, number, tuple(names), tuple(found))


def mosaics(packed: Packed, count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, S, S) uint8, each of four images at half the side: small photos have no fine detail when enlarged."""
    side = packed.pixels.shape[-1] // 2
    made = torch.empty(count, *packed.pixels.shape[1:], dtype=torch.uint8)
    for rows in torch.arange(count).split(256):
        chosen = torch.randint(len(packed.pixels), (4, len(rows)), generator=generator)
        parts = [_to_side(packed.pixels[few], side) for few in chosen]
        made[rows] = torch.cat([torch.cat(parts[:2], -1), torch.cat(parts[2:], -1)], -2)
    return made


def _rows(
    data_root: Path, source: str, classes: int, quality: int, parts: Collection[str]
) -> list[tuple[str, str, int, bytes]]:
    """(source, part, label, image) of a source. Classes that the CLIP never saw are not trained on here either."""
    held = PACKED.get(source, (0, 0))[1]  # as the CLIP's own training holds them out
    rows, seen = [], [0] * classes
    never = {label for label, name in enumerate(_class_names(data_root, source)) if name in NEVER_READ.get(source, ())}
    train = [row for split in TRAIN.get(source, ("train",)) for row in _read(data_root, source, split)]
    for index in np.random.default_rng(0).permutation(len(train)).tolist():
        image, label = train[index]
        seen[label] += 1
        if seen[label] <= held or label not in never:
            part = "validation" if seen[label] <= held else "gate" if seen[label] % GATE == 0 else "train"
            if part in parts:
                rows.append((source, part, label, _encode(image, quality)))
    if held == 0 and "validation" in parts:
        rows += [
            (source, "validation", label, _encode(image, quality))
            for image, label in _read(data_root, source, "validation")
        ]
    return rows


def _thinned(rows: list[tuple[str, str, int, bytes]], largest: float) -> list[tuple[str, str, int, bytes]]:
    """As many of the training rows as fit, the same share of every class."""
    sizes = {chosen: sum(len(row[3]) + 8 for row in rows if (row[1] == "train") == chosen) for chosen in (True, False)}
    share = min(1.0, (0.99 * largest - sizes[False]) / max(1, sizes[True]))
    seen: dict[tuple[str, int], int] = {}
    kept = []
    for row in rows:
        number = seen[row[0], row[2]] = seen.get((row[0], row[2]), 0) + (row[1] == "train")
        if row[1] != "train" or int(number * share) > int((number - 1) * share):
            kept.append(row)
    return kept


def _class_names(data_root: Path, source: str) -> list[str]:
    schema = pq.read_schema(_files(data_root, source, "train")[0])
    return list(json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"])


def _read(data_root: Path, source: str, split: str) -> Iterator[tuple[bytes, int]]:
    for file in _files(data_root, source, split):
        table = pq.read_table(file, columns=["image", "label"])
        for image, label in zip(table["image"], table["label"], strict=True):
            yield image["bytes"].as_py(), label.as_py()


def _files(data_root: Path, source: str, split: str) -> list[Path]:
    folder = ASSETS / source if source == "clothing" else data_root / source
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise SystemExit(f"no {split}*.parquet in {folder}; give --data-root the folder of the parquet sets")
    return files


def _encode(data: bytes, quality: int) -> bytes:
    if quality == AS_IT_IS:
        return data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if min(image.size) > SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _decode(data: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def _to_side(pixels: Tensor, side: int) -> Tensor:
    """(B, 3, S, S) uint8 at another side, by the filter of the encoders."""
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)


if __name__ == "__main__":
    main()
