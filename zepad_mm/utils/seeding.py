"""Seeded generators: from a plain seed, or from a run's seed and a purpose; the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*keys: int | str) -> int:
    """Return a 63-bit seed from the run's seed and its purpose, the same on every machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(seed: int) -> torch.Generator:
    """Return a CPU generator seeded with ``seed`` itself."""
    return torch.Generator().manual_seed(seed)


def derived_generator(*keys: int | str) -> torch.Generator:
    """Return a CPU generator for one purpose at one step: it is neither saved in checkpoints nor shared."""
    return seeded_generator(derived_seed(*keys))


@contextmanager
def seeded(device: torch.device, *keys: int | str) -> Iterator[None]:
    """Seed the global generators, from which dropout draws, within the block; restore them after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(*keys))
        yield
