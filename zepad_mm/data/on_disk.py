"""Datasets on disk with random access, decoded on access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zepad_mm.data.base import IndexedDataset
from zepad_mm.data.loading import (
    check_header,
    check_label_column,
    class_names_of,
    dataset_name,
    decode,
    find_columns,
    open_table,
    raise_damaged,
    undecoded,
)
from zepad_mm.utils.images import Resize, as_resize


@dataclass(frozen=True)
class StoredImages(IndexedDataset):
    """A dataset on disk with random access: labels (N,) in memory, images decoded when fetched.

    Attributes:
        table: memory-mapped by ``datasets``, shared by all processes of a machine.
        resize: how every image is made a square.
    """

    table: Any
    image_column: str
    resize: Resize
    labels: Tensor
    class_names: tuple[str, ...]
    name: str

    def subset(self, indices: Tensor | Sequence[int]) -> StoredImages:
        """The rows at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.long)
        chosen, labels = self.table.select(index.tolist()), self.labels[index]
        return StoredImages(chosen, self.image_column, self.resize, labels, self.class_names, self.name)

    def fetch(self, indices: Tensor) -> Tensor:
        """The images (B, 3, S, S) in [0, 1] at ``indices`` (B,). Raises ValueError with the row of a damaged image."""
        rows = self.table.select_columns([self.image_column])[indices.tolist()][self.image_column]
        decoded = [
            decode(row, self.resize, f"{self.name}, row {i}") for row, i in zip(rows, indices.tolist(), strict=True)
        ]
        return torch.stack(decoded)

    def check_headers(self) -> None:
        """Open every image without decoding its pixels. Raises one ValueError for all that are missing or none."""
        damaged = []
        for number, row in enumerate(self.table.select_columns([self.image_column])):
            try:
                check_header(row[self.image_column], f"row {number}")
            except ValueError as error:
                damaged.append(str(error))
        raise_damaged(damaged, len(self), self.name)


def open_images(source: str, split: str, image_size: int | Resize = 64) -> StoredImages:
    """A dataset that stays on disk (a Hub dataset in the ``datasets`` cache); arguments and errors as ``load_data``."""
    table = open_table(source, split)
    image_column, label_column = find_columns(table, source)
    assert label_column is not None
    names, name = class_names_of(table.features, label_column), dataset_name(source)
    labels = check_label_column(table[label_column][:], len(names), f"{name}, split {split}")
    return StoredImages(undecoded(table, image_column), image_column, as_resize(image_size), labels, names, name)
