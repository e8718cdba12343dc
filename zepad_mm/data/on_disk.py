"""Data sets that memory does not hold: read from disk row by row, or streamed; decoded where they are asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zepad_mm.data.base import Rows
from zepad_mm.data.loading import class_names_of, columns_of, name_of, open_table, to_tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredImages(Rows):
    """A data set on disk: labels (N,) in memory, pictures decoded when they are fetched, in any order.

    Attributes:
        table: memory-mapped by ``datasets``; one copy for all processes of a machine.
        image_size: side that every picture is brought to.
    """

    table: Any
    image_column: str
    image_size: int
    labels: Tensor
    class_names: tuple[str, ...]
    name: str

    def subset(self, indices: Tensor | Sequence[int]) -> StoredImages:
        """The rows at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.long)
        chosen, labels = self.table.select(index.tolist()), self.labels[index]
        return StoredImages(chosen, self.image_column, self.image_size, labels, self.class_names, self.name)

    def fetch(self, indices: Tensor) -> Tensor:
        """The images (B, 3, S, S) in [0, 1] at ``indices`` (B,). Raises ValueError that names a damaged one's row."""
        rows = self.table.select_columns([self.image_column])[indices.tolist()][self.image_column]
        decoded = (
            _decoded(row, self.image_size, f"{self.name}, row {i}") for row, i in zip(rows, indices, strict=True)
        )
        return torch.stack(list(decoded))


@dataclass(frozen=True)
class StreamedImages:
    """A data set that is read from its beginning to its end, again and again, and never held.

    Each process has a share of its own: whole files where their number is a multiple of that of the processes, else
    every so-many-th row. Of its files each worker of a process has its own, so there must be as many as workers. Rows
    come in the order of a shuffle buffer, the same for the same seed and numbers of processes and workers.

    Attributes:
        stream: an ``IterableDataset`` whose image column is not decoded.
        shuffle_buffer: rows that the next one is drawn from; larger is more random and takes more memory (bytes of
            files, not pixels).
    """

    stream: Any
    image_column: str
    label_column: str
    image_size: int
    class_names: tuple[str, ...]
    name: str
    shuffle_buffer: int = 1000

    def rows(self, rank: int, world: int, seed: int, skip: int = 0) -> Iterator[tuple[Tensor, int]]:
        """(image (3, S, S), label) without an end, from the share of process ``rank`` of ``world``.

        In a worker of torch's DataLoader: from that worker's part of it. Begins behind ``skip`` rows, which are read
        but not decoded. Raises ValueError where there is no row to give, and for a damaged picture.
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
                    yield _decoded(row[self.image_column], self.image_size, where), int(row[self.label_column])
            epoch += 1
        raise ValueError(
            f"{self.name}: there is no row left for a worker of process {rank} of {world}; use fewer workers (at most "
            "as many as the set has files for each process) or fewer processes"
        )


def open_images(source: str, split: str, image_size: int = 64) -> StoredImages:
    """A set that stays on disk (a Hub set in the cache of ``datasets``). Arguments and errors as for ``load_data``."""
    from datasets import Image

    table = open_table(source, split)
    image_column, label_column = columns_of(table, source)
    names = class_names_of(table, label_column)
    labels = torch.tensor(table[label_column][:], dtype=torch.long)
    table = table.cast_column(image_column, Image(decode=False))
    return StoredImages(table, image_column, image_size, labels, names, name_of(source))


def stream_images(source: str, split: str, image_size: int = 64, shuffle_buffer: int = 1000) -> StreamedImages:
    """A set that is streamed, from the Hub or from local files. Arguments and errors as for ``load_data``."""
    from datasets import Image

    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer: expected at least 1 row, got {shuffle_buffer}")
    stream = open_table(source, split, streaming=True)
    image_column, label_column = columns_of(stream, source)
    names = class_names_of(stream, label_column)
    stream = stream.cast_column(image_column, Image(decode=False))
    return StreamedImages(stream, image_column, label_column, image_size, names, name_of(source), shuffle_buffer)


def _decoded(row: dict[str, Any], image_size: int, where: str) -> Tensor:
    from datasets import Image

    try:
        return to_tensor(Image().decode_example(row), image_size)
    except Exception as error:  # PIL has a dozen kinds
        raise ValueError(f"{where}: no picture can be read from it ({type(error).__name__}: {error})") from error
