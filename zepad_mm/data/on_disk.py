"""Datasets larger than memory: memory-mapped or streamed, decoded on access."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zepad_mm.data.base import IndexedDataset
from zepad_mm.data.loading import dataset_name, decode, find_columns, open_table, read_class_names, undecoded
from zepad_mm.utils.images import Resize, as_resize

log = logging.getLogger(__name__)


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
        decoded = (decode(row, self.resize, f"{self.name}, row {i}") for row, i in zip(rows, indices, strict=True))
        return torch.stack(list(decoded))


@dataclass(frozen=True)
class StreamedImages:
    """A dataset that is streamed repeatedly from beginning to end.

    Each process reads its own share: whole files if their number is a multiple of the number of processes, otherwise
    every k-th row. The workers of a process split its files, so there must be at least as many files as workers. Rows
    come from a shuffle buffer, in the same order for the same seed and numbers of processes and workers.

    Attributes:
        stream: an ``IterableDataset`` whose image column is not decoded.
        shuffle_buffer: number of rows that the next one is drawn from; more rows take more memory (encoded files, not
            pixels).
    """

    stream: Any
    image_column: str
    label_column: str
    resize: Resize
    class_names: tuple[str, ...]
    name: str
    shuffle_buffer: int = 1000

    def rows(self, rank: int, world: int, seed: int, skip: int = 0) -> Iterator[tuple[Tensor, int]]:
        """Yield (image (3, S, S), label) endlessly from the share of process ``rank`` of ``world``.

        In a worker of a DataLoader, from that worker's part of the share. Starts after ``skip`` rows, which are read
        but not decoded. Raises ValueError if the share has no rows, and for a damaged image.
        """
        from datasets.distributed import split_dataset_by_node

        shuffled = self.stream.shuffle(seed=seed % 2**32, buffer_size=self.shuffle_buffer)
        share = split_dataset_by_node(shuffled, rank, world)
        number, before, epoch = 0, -1, 0
        while number > before:
            before = number
            share.set_epoch(epoch)
            for row in share:
                number += 1
                if number > skip:
                    where = f"{self.name}, row {number} of process {rank}"
                    yield decode(row[self.image_column], self.resize, where), int(row[self.label_column])
            epoch += 1
        raise ValueError(
            f"{self.name}: no rows for a worker of process {rank} of {world}; use fewer workers (at most "
            "as many as the dataset has files per process) or fewer processes"
        )


def open_images(source: str, split: str, image_size: int | Resize = 64) -> StoredImages:
    """A dataset that stays on disk (a Hub dataset in the ``datasets`` cache); arguments and errors as ``load_data``."""
    table = open_table(source, split)
    image_column, label_column = find_columns(table, source)
    names = read_class_names(table, label_column)
    labels = torch.tensor(table[label_column][:], dtype=torch.long)
    table, resize = undecoded(table, image_column), as_resize(image_size)
    return StoredImages(table, image_column, resize, labels, names, dataset_name(source))


def stream_images(source: str, split: str, image_size: int | Resize = 64, shuffle_buffer: int = 1000) -> StreamedImages:
    """A dataset streamed from the Hub or local files; arguments and errors as ``load_data``."""
    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer: expected at least 1 row, got {shuffle_buffer}")
    stream = open_table(source, split, streaming=True)
    image_column, label_column = find_columns(stream, source)
    names = read_class_names(stream, label_column)
    stream, resize = undecoded(stream, image_column), as_resize(image_size)
    return StreamedImages(stream, image_column, label_column, resize, names, dataset_name(source), shuffle_buffer)
