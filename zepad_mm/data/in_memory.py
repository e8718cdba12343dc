"""Datasets in memory: images in [0, 1] and their labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zepad_mm.data.base import IndexedDataset
from zepad_mm.data.loading import (
    EMBEDDED_DATA,
    EMBEDDED_SIZE,
    check_label_column,
    class_names_of,
    dataset_name,
    decode,
    find_columns,
    local_folder,
    open_table,
    raise_damaged,
    undecoded,
)
from zepad_mm.data.webdataset import Webdataset
from zepad_mm.utils.images import Resize, as_resize
from zepad_mm.utils.seeding import seeded_generator

UNLABELLED = -1
DEFAULT_SIZE = 64  # side in pixels


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

    def keep_classes(self, keep: Tensor) -> LabelledImages:
        """Only the images of the classes in ``keep`` (C,) bool, relabelled."""
        rows, relabel = keep[self.labels].nonzero().squeeze(1), keep.cumsum(0) - 1
        names = tuple(name for name, kept in zip(self.class_names, keep.tolist(), strict=True) if kept)
        return LabelledImages(self.images[rows], relabel[self.labels[rows]], names, self.name)

    def fetch(self, indices: Tensor) -> Tensor:
        """The images (B, 3, S, S) at ``indices`` (B,)."""
        return self.images[indices]

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) in batches of ``size``, shuffled if a generator is given."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for start in range(0, len(self), size):
            index = order[start : start + size]
            yield self.images[index], self.labels[index]


def joined(sets: Sequence[LabelledImages]) -> LabelledImages:
    """The images of several sets as one; classes of different sets stay apart, and what has no label gets none.

    Raises ValueError for images of different sizes.
    """
    shapes = {one.name: tuple(one.images.shape[1:]) for one in sets}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"joined: expected images of one size, got {shapes}; load them at one image_size")
    labels, names = [], list[str]()
    for one in sets:
        labels.append(torch.where(one.labels == UNLABELLED, UNLABELLED, one.labels + len(names)))
        names += one.class_names
    name = "+".join(one.name for one in sets)
    return LabelledImages(torch.cat([one.images for one in sets]), torch.cat(labels), tuple(names), name)


def load_data(
    source: str,
    split: str,
    image_size: int | Resize | None = None,
    n: int | None = None,
    seed: int = 0,
    labelled: bool = True,
) -> LabelledImages:
    """A labelled image dataset in memory.

    Args:
        source: ``"embedded"``; a folder with parquet files or class folders (see :mod:`zepad_mm.data.folders`); the
            name of a dataset on the Hub, e.g. ``"uoft-cs/cifar10"``; a short name of the ``CATALOGUE``, e.g.
            ``"svhn"``; or ``"wds:OWNER/NAME"`` (see :mod:`zepad_mm.data.webdataset`). Where several columns fit,
            ``NAME?image=COLUMN&label=COLUMN`` says which.
        split: ``train``, ``test``, ..., or several as ``train+surrogate``; the embedded dataset has ``surrogate``,
            ``train``, ``validation``, ``test``.
        image_size: an encoder's ``preprocess``: images are resized and cropped as it would do itself, so that it sees
            the same pixels as of the files; or a side in pixels, which every image is squashed to, as the embedded
            CLIP does; None: 64, and for the embedded images what the embedded CLIP sees.
        n: number of images, drawn by ``seed``; None: all.
        labelled: whether labels are needed; without, a folder of images needs no class folders, and labels that are
            not there are -1.

    Raises:
        FileNotFoundError: no such folder or split.
        ValueError: damaged or missing images, missing labels or labels outside the classes (with their rows), no image
            or label column or several, or a dataset that does not match its catalogue entry.
    """
    table = open_table(source, split)
    image_column, label_column = find_columns(table, source, labelled)
    names, name = class_names_of(table.features, label_column), dataset_name(source)
    rows = list(range(len(table)))
    if n is not None and n < len(table):
        if n < 1:
            raise ValueError(f"n: expected a positive number of images, got {n}")
        rows = sorted(torch.randperm(len(table), generator=seeded_generator(seed))[:n].tolist())
        table = table.select(rows)
    where = f"{name}, split {split}"
    labels = torch.full((len(rows),), UNLABELLED)
    if label_column is not None:
        labels = check_label_column(table[label_column][:], len(names), where)
    encoded = undecoded(table.select_columns([image_column]), image_column)
    if image_size is None:
        image_size = EMBEDDED_SIZE if local_folder(source) == EMBEDDED_DATA else DEFAULT_SIZE
    return LabelledImages(_decode_all(encoded[image_column], rows, as_resize(image_size), where), labels, names, name)


def _decode_all(encoded: Iterable[Any], rows: Sequence[int], resize: Resize, where: str) -> Tensor:
    """The images (N, 3, S, S). Raises one ValueError for all that are damaged, with their rows and paths."""
    images, damaged = [], []
    for number, row in zip(rows, encoded, strict=True):
        try:
            images.append(decode(row, resize, f"row {number}"))
        except ValueError as error:
            damaged.append(str(error))
    raise_damaged(damaged, len(rows), where)
    if not images:
        raise ValueError(f"{where}: there is no image")
    return torch.stack(images)


def load_class_names(source: str, split: str) -> tuple[str, ...]:
    """The class names of a dataset, without its images; arguments and errors as :func:`load_data`."""
    shards = Webdataset.parse(source)
    if shards is not None:
        return tuple(shards.class_names())
    table = open_table(source, split)
    return class_names_of(table.features, find_columns(table, source)[1])


def load_templates(source: str) -> tuple[str, ...] | None:
    """The prompt templates that come with a dataset, for zero-shot heads; None for one without."""
    shards = Webdataset.parse(source)
    return None if shards is None else shards.templates()


def load_embedded(split: str, n: int | None = None) -> tuple[Tensor, Tensor]:
    """The embedded images: ``(images (N, 3, S, S) in [0, 1], labels (N,))``, S as the embedded CLIP sees them.

    ``test`` is used in no training or selection; ``surrogate`` is the training data of the embedded CLIP and of
    attackers; ``train`` is the defender's own; ``validation`` selects thresholds and fusion constants. The images are
    the first ``n`` of one fixed random order: those of a smaller ``n`` are the first of those of a larger one.
    """
    data = load_data("embedded", split, n=n)
    order = torch.randperm(len(open_table("embedded", split)), generator=seeded_generator(0))[: len(data)]
    ranks = order.argsort().argsort()  # load_data gives the same rows in ascending order
    return data.images[ranks], data.labels[ranks]
