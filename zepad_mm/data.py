"""Data in: ``datasets`` parquet, folders of pictures, the Hub or the embedded set; images in [0, 1] out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.prompts import clean_name

log = logging.getLogger(__name__)

EMBEDDED_DATA = Path(__file__).parent / "assets" / "clothing"
EMBEDDED_SPLITS = ("surrogate", "train", "validation", "test")


@dataclass(frozen=True)
class LabelledImages:
    """A data set in memory: ``images`` (N, 3, S, S) in [0, 1] float32, ``labels`` (N,), the names of the classes."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> LabelledImages:
        """The rows at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.long)
        return LabelledImages(self.images[index], self.labels[index], self.class_names, self.name)

    def sample(self, n: int | None, seed: int = 0) -> LabelledImages:
        """``n`` rows drawn without replacement by ``seed``, in a fixed order; all of them for None or n >= N."""
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise ValueError(f"n: expected a positive number of images, got {n}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.subset(order[:n].sort().values)

    def split(self, share: float, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
        """(the rest, ``share`` of the rows but at least one), drawn by ``seed``, each in a fixed order."""
        if not 0 < share < 1 or len(self) < 2:
            raise ValueError(f"split: expected a share in (0, 1) of at least 2 images, got {share} of {len(self)}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = max(1, int(share * len(self)))
        return self.subset(order[held:].sort().values), self.subset(order[:held].sort().values)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) in batches of ``size``, shuffled when a generator is given."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for start in range(0, len(self), size):
            index = order[start : start + size]
            yield self.images[index], self.labels[index]


def to_tensor(picture: Any, image_size: int | None = None) -> Tensor:
    """A PIL picture as (3, H, W) float32 in [0, 1]; squashed to a square of ``image_size`` where one is given."""
    from torchvision.transforms.functional import pil_to_tensor

    pixels = pil_to_tensor(picture.convert("RGB")).float() / 255
    if image_size is None or pixels.shape[-2:] == (image_size, image_size):
        return pixels
    resized = F.interpolate(pixels[None], (image_size, image_size), mode="bicubic", antialias=True)[0]
    return resized.clamp(0, 1)


def load_data(source: str, split: str, image_size: int = 64, n: int | None = None, seed: int = 0) -> LabelledImages:
    """Any labelled image set, in memory.

    Args:
        source: ``"embedded"``; a folder with parquet files named ``SPLIT-*.parquet`` or with class folders
            (``imagefolder``); or the name of a set on the Hub, e.g. ``"uoft-cs/cifar10"``.
        split: ``train``, ``test``, ..., or several as ``train+surrogate``; the embedded set has ``surrogate``,
            ``train``, ``validation``, ``test``.
        image_size: side in pixels that every picture is brought to.
        n: keep that many pictures, drawn by ``seed``; None keeps all.

    Raises:
        FileNotFoundError: no such folder or split; ValueError: no image or label column.
    """
    table = _open_all(source, split)
    image_column, label_column = _columns(table, source)
    if n is not None and n < len(table):
        if n < 1:
            raise ValueError(f"n: expected a positive number of images, got {n}")
        order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
        table = table.select(sorted(order[:n].tolist()))
    names = tuple(clean_name(name) for name in table.features[label_column].names)
    images = torch.stack([to_tensor(row[image_column], image_size) for row in table])
    labels = torch.tensor(table[label_column], dtype=torch.long)
    return LabelledImages(images, labels, names, "clothing" if source == "embedded" else Path(source).name)


def load_embedded(split: str, n: int | None = None) -> tuple[Tensor, Tensor]:
    """The pictures that ship with the package: ``(images (N, 3, 64, 64) in [0, 1], labels (N,))``.

    ``test`` was used in no training and no selection; ``surrogate`` is what the public CLIP saw and attackers use;
    ``train`` is the defender's own; thresholds and fusion constants come from ``validation``.
    """
    data = load_data("embedded", split, n=n)
    return data.images, data.labels


def _open_all(source: str, split: str) -> Any:
    from datasets import concatenate_datasets

    tables = [_open(source, part) for part in split.split("+")]
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)


def _open(source: str, split: str) -> Any:
    import datasets
    from datasets import load_dataset

    datasets.disable_progress_bars()
    folder = EMBEDDED_DATA if source == "embedded" else Path(source)
    if folder.is_dir():
        files = sorted(str(path) for path in folder.glob(f"{split}*.parquet"))
        if files:
            return _read_parquet(files, split)
        if any(folder.glob("*.parquet")):
            have = sorted({path.name.split("-")[0].removesuffix(".parquet") for path in folder.glob("*.parquet")})
            raise FileNotFoundError(f"data set {source!r} has no split {split!r}; it has {', '.join(have)}")
        return load_dataset("imagefolder", data_dir=str(folder), split=split)
    if source == "embedded" or source.startswith((".", "/")):
        raise FileNotFoundError(f"{folder} is no folder; expected parquet files or class folders of pictures there")
    try:
        return load_dataset(source, split=split)
    except Exception as error:
        raise FileNotFoundError(
            f"data set {source!r} is neither a folder here nor reachable on the Hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); give a folder, a Hub name, or 'embedded'"
        ) from error


def _read_parquet(files: list[str], split: str) -> Any:
    from datasets import Dataset

    try:
        return Dataset.from_parquet(files)
    except Exception as error:  # pyarrow, datasets and fsspec each have their own
        raise ValueError(f"{', '.join(files)} is not a complete parquet file ({error})") from error


def _columns(table: Any, source: str) -> tuple[str, str]:
    from datasets import ClassLabel, Image

    images = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in table.features.items() if isinstance(feature, ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"data set {source!r} has the columns {dict(table.features)}; expected one of type Image and one ClassLabel"
        )
    return images[0], "label" if "label" in labels else labels[0]
