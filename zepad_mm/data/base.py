"""Sampling and splitting of datasets with indexed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from zepad_mm.utils.seeding import seeded_generator


class IndexedDataset:
    """A dataset of N rows with ``labels`` (N,); sub-classes implement ``subset``."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor | Sequence[int]) -> Self:
        """The rows at ``indices``, in that order."""
        raise NotImplementedError

    def sample(self, n: int | None, seed: int = 0) -> Self:
        """``n`` rows drawn without replacement by ``seed``, in their order; all rows for None or n >= N."""
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise ValueError(f"n: expected a positive number of images, got {n}")
        order = torch.randperm(len(self), generator=seeded_generator(seed))
        return self.subset(order[:n].sort().values)

    def split(self, share: float, seed: int = 0) -> tuple[Self, Self]:
        """The rest, and a ``share`` of at least one row drawn by ``seed``, each in their order."""
        if not 0 < share < 1 or len(self) < 2:
            raise ValueError(f"split: expected a share in (0, 1) of at least 2 images, got {share} of {len(self)}")
        order = torch.randperm(len(self), generator=seeded_generator(seed))
        held_out = max(1, int(share * len(self)))
        return self.subset(order[held_out:].sort().values), self.subset(order[:held_out].sort().values)
