"""Datasets that are streamed: every row exactly once per epoch, whatever the number of processes and workers.

The rows of an epoch are put in order by the seed (whole row groups of the parquet files, then within a shuffle buffer)
and dealt to the readers in parts that differ by at most one row, whatever the sizes of the files. Readers are the
workers of all processes; after each epoch the shares are dealt anew, and no reader gets ahead of another by more than a
row. That needs the number of rows, which parquet files tell, in a folder or on the Hub, and image files in a folder.

Other files on the Hub (archives of images, selections of rows by the catalogue) tell none: ``datasets`` shares them by
whole files where their number is a multiple of the number of processes, else by every k-th row, and each reader starts
over when its own share ends. Where shares are uneven (files of 8 and 72 rows and two processes), rows of the smaller
ones are seen more often, and a warning says so; download such a dataset and stream it from the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zepad_mm.data.catalogue import find_entry
from zepad_mm.data.folders import parquet_files
from zepad_mm.data.loading import (
    check_label_column,
    choose_columns,
    class_names_of,
    dataset_name,
    decode,
    find_columns,
    local_folder,
    open_table,
    parquet_features,
    split_options,
    split_parts,
    undecoded,
)
from zepad_mm.utils.images import Resize, as_resize
from zepad_mm.utils.seeding import derived_generator

log = logging.getLogger(__name__)
READERS = 16  # files on the Hub whose ends are read at the same time
CHUNK = 256  # rows of a folder that are shuffled as one


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file."""

    file: Any
    number: int
    first: int  # row of the file
    size: int

    def rows(self, begin: int, end: int, columns: tuple[str, str]) -> Iterator[tuple[Any, int, str]]:
        """Yield (undecoded image, label, where) of the rows from ``begin`` to ``end`` of the group."""
        import pyarrow as pa

        opened, _ = parquet_features(self.file)
        row = 0
        try:
            for batch in opened.iter_batches(64, row_groups=[self.number], columns=list(columns)):
                part = batch.slice(max(0, begin - row), max(0, min(end - row, len(batch)) - max(0, begin - row)))
                start = self.first + max(row, begin)
                for offset, (image, label) in enumerate(
                    zip(*(part[name].to_pylist() for name in columns), strict=True)
                ):
                    yield image, label, f"row {start + offset} of {self.file}"
                row += len(batch)
                if row >= end:
                    return
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.file} is not a complete parquet file: row group {self.number}: {error}") from error


@dataclass(frozen=True)
class Rows:
    """Some rows of a table in memory."""

    table: Any
    first: int
    size: int

    def rows(self, begin: int, end: int, columns: tuple[str, str]) -> Iterator[tuple[Any, int, str]]:
        """As of :class:`RowGroup`."""
        part = self.table[self.first + begin : self.first + end]
        for offset, (image, label) in enumerate(zip(*(part[name] for name in columns), strict=True)):
            yield image, label, f"row {self.first + begin + offset}"


@dataclass(frozen=True)
class StreamedImages:
    """A dataset that is streamed repeatedly from beginning to end.

    Rows come from a shuffle buffer, in the same order for the same seed and numbers of processes and workers.

    Attributes:
        units: what the order of an epoch is made of; empty for a stream of unknown length.
        stream: an ``IterableDataset`` whose image column is not decoded, where there are no units.
        shuffle_buffer: number of rows that the next one is drawn from; more rows take more memory (encoded files, not
            pixels).
    """

    units: tuple[RowGroup | Rows, ...]
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
        but not decoded. Raises ValueError if there are no rows, and for a damaged image or a missing label.
        """
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        encoded = (
            self._endless(rank, world, seed)
            if not self.units
            else self._dealt(rank + world * number, world * workers, seed, skip)
        )
        for position, (image, label, where) in enumerate(encoded):
            if self.units or position >= skip:
                place = f"{self.name}, {where} (process {rank})"
                if label is None or not 0 <= label < len(self.class_names):
                    raise ValueError(
                        f"{place}: expected a label from 0 to {len(self.class_names) - 1}, got {label}; is it a split "
                        "whose labels are hidden?"
                    )
                yield decode(image, self.resize, place), int(label)

    def _dealt(self, reader: int, readers: int, seed: int, skip: int) -> Iterator[tuple[Any, int, str]]:
        """The rows of one of all readers, from its row ``skip`` on."""
        total, epoch = sum(unit.size for unit in self.units), 0
        while True:
            begin, end = share_of_epoch(total, epoch, reader, readers)
            if skip >= end - begin:
                skip -= end - begin
            else:
                rows = self._shuffled(begin, end, seed, epoch, reader)
                for position, row in enumerate(rows):
                    if position >= skip:
                        yield row
                skip = 0
            epoch += 1

    def _shuffled(self, begin: int, end: int, seed: int, epoch: int, reader: int) -> Iterator[tuple[Any, int, str]]:
        """The rows ``begin`` to ``end`` of an epoch, from a shuffle buffer."""
        generator = derived_generator(seed, "shuffle buffer", epoch, reader)
        buffer: list[tuple[Any, int, str]] = []
        for row in self._in_order(begin, end, seed, epoch):
            if len(buffer) < self.shuffle_buffer:
                buffer.append(row)
                continue
            chosen = int(torch.randint(len(buffer), (), generator=generator))
            yield buffer[chosen]
            buffer[chosen] = row
        for chosen in torch.randperm(len(buffer), generator=generator).tolist():
            yield buffer[chosen]

    def _in_order(self, begin: int, end: int, seed: int, epoch: int) -> Iterator[tuple[Any, int, str]]:
        """The rows ``begin`` to ``end`` of an epoch, whose units are permuted."""
        first, columns = 0, (self.image_column, self.label_column)
        for number in torch.randperm(len(self.units), generator=derived_generator(seed, "units", epoch)).tolist():
            unit = self.units[number]
            if first < end and begin < first + unit.size:
                yield from unit.rows(max(0, begin - first), min(unit.size, end - first), columns)
            first += unit.size

    def _endless(self, rank: int, world: int, seed: int) -> Iterator[tuple[Any, int, str]]:
        """The rows of a stream of unknown length, as ``datasets`` shares them."""
        from datasets.distributed import split_dataset_by_node

        shuffled = self.stream.shuffle(seed=seed % 2**32, buffer_size=self.shuffle_buffer)
        share = split_dataset_by_node(shuffled, rank, world)
        number, before, epoch = 0, -1, 0
        while number > before:
            before = number
            share.set_epoch(epoch)
            for row in share:
                number += 1
                yield row[self.image_column], row[self.label_column], f"row {number} of this share"
            epoch += 1
        raise ValueError(
            f"{self.name}: no rows for a worker of process {rank} of {world}; use fewer workers (at most "
            "as many as the dataset has files per process) or fewer processes"
        )


def share_of_epoch(total: int, epoch: int, reader: int, readers: int) -> tuple[int, int]:
    """The rows (begin, end) of an epoch of ``total`` rows that a reader gets.

    Over all epochs the n-th row goes to reader n modulo ``readers``: that is how many each one gets; which ones follows
    from their order.
    """

    def taken(one: int, rows: int) -> int:
        return max(0, (rows - one + readers - 1) // readers)

    counts = [taken(one, (epoch + 1) * total) - taken(one, epoch * total) for one in range(reader + 1)]
    return sum(counts[:-1]), sum(counts)


def stream_images(source: str, split: str, image_size: int | Resize = 64, shuffle_buffer: int = 1000) -> StreamedImages:
    """A dataset streamed from the Hub or local files; arguments and errors as ``load_data``."""
    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer: expected at least 1 row, got {shuffle_buffer}")
    name, folder = dataset_name(source), local_folder(source)
    units: tuple[RowGroup | Rows, ...] = ()
    if folder is None:
        stream = open_table(source, split, streaming=True)
        image_column, label_column = find_columns(stream, source)
        names, stream = class_names_of(stream.features, label_column), undecoded(stream, image_column)
        units = _hub_units(source, split, (image_column, str(label_column)))
        if not units:
            log.warning(
                "%s lies in files on the Hub that do not tell their number of rows: with several processes or workers, "
                "rows of small files are seen more often; download it and give the folder for every row once per epoch",
                name,
            )
    else:
        stream, features = None, None
        for part in split_parts(split):
            its_features, its_units = _local_units(source, part)
            if features is not None and its_features != features:
                raise ValueError(f"dataset {source!r}: the parts of {split!r} have other columns or classes")
            features, units = its_features, (*units, *its_units)
        image_column, label_column = choose_columns(features, source)
        names = class_names_of(features, label_column)
        _check_labels(units, str(label_column), len(names), f"{name}, split {split}")
        units = tuple(
            Rows(undecoded(unit.table, image_column), unit.first, unit.size) if isinstance(unit, Rows) else unit
            for unit in units
        )
    assert label_column is not None
    return StreamedImages(units, stream, image_column, label_column, as_resize(image_size), names, name, shuffle_buffer)


def _local_units(source: str, split: str) -> tuple[Any, tuple[RowGroup | Rows, ...]]:
    """Features and units of a split in a folder."""
    folder = local_folder(source)
    assert folder is not None
    files = parquet_files(folder, split)
    if files is None:
        table = open_table(source, split)
        return table.features, tuple(
            Rows(table, first, min(CHUNK, len(table) - first)) for first in range(0, len(table), CHUNK)
        )
    units: list[RowGroup] = []
    features = None
    for file in files:
        opened, its_features = parquet_features(file)
        if features is not None and its_features != features:
            raise ValueError(f"{file} has other columns or classes than {files[0]}: {dict(its_features)!s:.500}")
        features = its_features
        units += _row_groups(file, opened)
    if not sum(unit.size for unit in units):
        raise ValueError(f"dataset {source!r}: the split {split!r} has no rows")
    return features, tuple(units)


def _row_groups(file: Any, opened: Any) -> list[RowGroup]:
    """The row groups of a parquet file."""
    sizes = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
    return [RowGroup(file, number, sum(sizes[:number]), size) for number, size in enumerate(sizes)]


def _hub_units(source: str, split: str, columns: tuple[str, str]) -> tuple[RowGroup, ...]:
    """The row groups of a data set on the Hub, from the ends of its parquet files; empty for files of other kinds."""
    from datasets import load_dataset_builder
    from datasets.packaged_modules.parquet.parquet import Parquet

    name = split_options(source)[0]
    entry = find_entry(name)
    builder = load_dataset_builder(*((name, None) if entry is None else (entry.hub, entry.config)))
    files, parts = builder.config.data_files or {}, split_parts(split)
    if entry is not None:
        if entry.split_column or any(part in entry.shares for part in parts):  # selections of rows
            return ()
        parts = [entry.hub_split(part) for part in parts]
    if not isinstance(builder, Parquet) or not all(part in files for part in parts):
        return ()
    paths = [str(path) for part in parts for path in files[part]]
    with ThreadPoolExecutor(READERS) as pool:
        opened = list(pool.map(lambda path: parquet_features(path)[0], paths))
    if not all(_is_encoded(one.schema_arrow, columns) for one in opened):
        return ()
    return tuple(unit for path, one in zip(paths, opened, strict=True) for unit in _row_groups(path, one))


def _is_encoded(schema: Any, columns: tuple[str, str]) -> bool:
    """Whether the image column of a file holds encoded images and its label column class indices."""
    from pyarrow import types

    if not set(columns) <= set(schema.names):
        return False
    image, label = (schema.field(name).type for name in columns)
    return types.is_struct(image) and types.is_integer(label)


def _check_labels(units: Sequence[RowGroup | Rows], column: str, classes: int, where: str) -> None:
    """Raise ValueError where a label is missing or outside the classes, before anything is trained."""
    tables = {id(unit.table): unit.table for unit in units if isinstance(unit, Rows)}
    for table in tables.values():
        check_label_column(table[column][:], classes, where)
    for file in dict.fromkeys(unit.file for unit in units if isinstance(unit, RowGroup)):
        opened, _ = parquet_features(file)
        check_label_column(opened.read([column])[column].to_pylist(), classes, f"{where}, {file}")
