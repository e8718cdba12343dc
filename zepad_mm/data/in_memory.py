"""Datasets in memory: images in [0, 1] and their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.data.base import IndexedDataset
from zepad_mm.data.loading import dataset_name, decode, find_columns, open_table, read_class_names, undecoded
from zepad_mm.utils.images import Resize, as_resize
from zepad_mm.utils.seeding import seeded_generator


@dataclass(frozen=True)
class LabelledImages(IndexedDataset):
    """A dataset in memory: ``images`` (N, 3, S, S) float32 in [0, 1], ``labels`` (N,) and class names."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    name: str

    def subset(self, indices: Tensor | Sequence[int]) -> LabelledImages:
        """The rows at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.long)
        return LabelledImages(self.images[index], self.labels[index], self.class_names, self.name)

    def fetch(self, indices: Tensor) -> Tensor:
        """The images (B, 3, S, S) at ``indices`` (B,)."""
        return self.images[indices]

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) in batches of ``size``, shuffled if a generator is given."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for start in range(0, len(self), size):
            index = order[start : start + size]
            yield self.images[index], self.labels[index]


def load_data(
    source: str, split: str, image_size: int | Resize = 64, n: int | None = None, seed: int = 0
) -> LabelledImages:
    """A labelled image dataset in memory.

    Args:
        source: ``"embedded"``; a folder with parquet files named ``SPLIT-*.parquet`` or with class folders
            (``imagefolder``); the name of a dataset on the Hub, e.g. ``"uoft-cs/cifar10"``; or a short name of the
            ``CATALOGUE``, e.g. ``"svhn"``.
        split: ``train``, ``test``, ..., or several as ``train+surrogate``; the embedded dataset has ``surrogate``,
            ``train``, ``validation``, ``test``.
        image_size: an encoder's ``preprocess``: images are resized and cropped as it would do itself, so that it sees
            the same pixels as of the files; or a side in pixels, which every image is squashed to, as the embedded
            CLIP does.
        n: number of images, drawn by ``seed``; None: all.

    Raises:
        FileNotFoundError: no such folder or split.
        ValueError: no image or label column, or a dataset that does not match its catalogue entry.
    """
    table = open_table(source, split)
    image_column, label_column = find_columns(table, source)
    if n is not None and n < len(table):
        if n < 1:
            raise ValueError(f"n: expected a positive number of images, got {n}")
        order = torch.randperm(len(table), generator=seeded_generator(seed))
        table = table.select(sorted(order[:n].tolist()))
    names = read_class_names(table, label_column)
    labels = torch.tensor(table[label_column], dtype=torch.long)
    rows, resize, name = undecoded(table, image_column)[image_column], as_resize(image_size), dataset_name(source)
    images = torch.stack([decode(row, resize, f"{name}, {split}, row {number}") for number, row in enumerate(rows)])
    return LabelledImages(images, labels, names, name)


def load_class_names(source: str, split: str) -> tuple[str, ...]:
    """The class names of a dataset, without its images; arguments and errors as :func:`load_data`."""
    table = open_table(source, split)
    return read_class_names(table, find_columns(table, source)[1])


def load_embedded(split: str, n: int | None = None) -> tuple[Tensor, Tensor]:
    """The embedded images: ``(images (N, 3, 64, 64) in [0, 1], labels (N,))``.

    ``test`` is used in no training or selection; ``surrogate`` is the training data of the embedded CLIP and of
    attackers; ``train`` is the defender's own; ``validation`` selects thresholds and fusion constants.
    """
    data = load_data("embedded", split, n=n)
    return data.images, data.labels
