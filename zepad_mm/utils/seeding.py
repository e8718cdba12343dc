"""Seeded generators: from a plain seed, or from a run's seed and a purpose; the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*keys: int | str) -> int:
    """A 63-bit seed from the run's seed and what it is for, the same on every machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator seeded with ``seed`` itself."""
    return torch.Generator().manual_seed(seed)


def derived_generator(*keys: int | str) -> torch.Generator:
    """A CPU generator for one purpose at one step: nothing to save in a checkpoint, nothing shared."""
    return seeded_generator(derived_seed(*keys))


@contextmanager
def seeded(device: torch.device, *keys: int | str) -> Iterator[None]:
    """Dropout draws from the global generators: inside the block they are seeded, after it they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(*keys))
        yield
