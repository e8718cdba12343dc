"""Dataloader: the share of each global batch for one process, from memory, disk or a stream, decoded by workers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from zepad_mm.data import LabelledImages, StoredImages, StreamedImages
from zepad_mm.training.settings import TrainData, TrainSettings
from zepad_mm.utils.seeding import derived_generator, derived_seed

Share = tuple[Tensor, Tensor, Tensor]  # images (b, 3, S, S), labels (b,), rows of the data set or of the stream (b,)


def steps_of(train: TrainData, settings: TrainSettings) -> tuple[int, int]:
    """(all steps, steps per epoch); a stream has one epoch, as long as the run.

    Raises ValueError for a stream without ``steps``.
    """
    if isinstance(train, StreamedImages):
        if settings.steps is None:
            raise ValueError("steps: a stream has no length; give the number of optimiser steps")
        return settings.steps, settings.steps
    per_epoch = len(train) // settings.batch_size
    return settings.steps or settings.epochs * per_epoch, per_epoch


def size_of(train: TrainData) -> int | None:
    """The number of images; None for a stream."""
    return None if isinstance(train, StreamedImages) else len(train)


def order_of(train: LabelledImages | StoredImages, settings: TrainSettings, epoch: int) -> Tensor:
    """(N,) the permutation of an epoch, the same on every process."""
    return torch.randperm(len(train), generator=derived_generator(settings.seed, "order", epoch))


def shares(
    train: TrainData, settings: TrainSettings, rank: int, world: int, start: int, total: int, pin: bool
) -> Iterator[Share]:
    """This process's shares of the batches of steps ``start`` to ``total``, every ``world``-th row of each.

    Which images a step sees follows from the seed and the step; with a stream also from the numbers of processes and
    workers, since each of them has its own part of it.

    Args:
        pin: whether to place the tensors in pinned memory, for a GPU.
    """
    if isinstance(train, StreamedImages):
        first = start - start % max(1, settings.num_workers)  # the first worker comes next
        dataset: Dataset = _Stream(train, settings, rank, world, first)
        loader: DataLoader = DataLoader(dataset, None, num_workers=settings.num_workers, pin_memory=pin)
        return islice(loader, start - first, total - first)
    loader = DataLoader(
        _Fetched(train),
        batch_sampler=_Order(train, settings, rank, world, start, total),
        num_workers=settings.num_workers,
        pin_memory=pin,
        collate_fn=_identity,  # a batch is fetched whole
        generator=torch.Generator(),  # or it draws from the global one
    )
    return iter(loader)


class _Fetched(Dataset):
    def __init__(self, train: LabelledImages | StoredImages) -> None:
        self.train = train

    def __getitems__(self, rows: list[int]) -> Share:
        index = torch.tensor(rows)
        return self.train.fetch(index), self.train.labels[index], index


class _Order(Sampler[list[int]]):
    def __init__(
        self, train: LabelledImages | StoredImages, settings: TrainSettings, rank: int, world: int, *steps: int
    ) -> None:
        self.train, self.settings, self.rank, self.world, self.steps = train, settings, rank, world, steps

    def __iter__(self) -> Iterator[list[int]]:
        size, (_, per_epoch) = self.settings.batch_size, steps_of(self.train, self.settings)
        order, known = torch.empty(0), -1
        for step in range(*self.steps):
            epoch, number = divmod(step, per_epoch)
            if epoch != known:
                order, known = order_of(self.train, self.settings, epoch), epoch
            yield order[number * size : (number + 1) * size][self.rank :: self.world].tolist()


class _Stream(IterableDataset):
    """The batches of one process from step ``start`` on; with workers, each of them makes its part of these."""

    def __init__(self, train: StreamedImages, settings: TrainSettings, rank: int, world: int, start: int) -> None:
        self.train, self.settings, self.rank, self.world, self.start = train, settings, rank, world, start

    def __iter__(self) -> Iterator[Share]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        size, seed = self.settings.batch_size // self.world, derived_seed(self.settings.seed, "stream")
        step = self.start + number  # torch asks the workers in turn
        rows = self.train.rows(self.rank, self.world, seed, skip=self.start // workers * size)
        while True:
            pixels, labels = zip(*islice(rows, size), strict=True)
            place = step * self.settings.batch_size + self.rank + self.world * torch.arange(size)
            yield torch.stack(pixels), torch.tensor(labels), place
            step += workers


def _identity(fetched: Any) -> Any:
    return fetched
