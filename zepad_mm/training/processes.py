"""Processes, randomness and batches: what makes one, two or sixteen processes do the same work."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from zepad_mm.attacks.base import frozen
from zepad_mm.training.tracking import TRACKERS


def make_accelerator(
    processes: int | None = None, mixed_precision: str = "no", tracker: str = "none", folder: str | Path | None = None
) -> Accelerator:
    """An accelerator on whatever is there: GPUs, or gloo processes on the CPU.

    Args:
        processes: how many the caller counts on. ``accelerate launch --cpu --num_processes 2`` silently starts one.
        mixed_precision: "no", "fp16" or "bf16".
        tracker: "none", "tensorboard" or "trackio"; ``metrics.jsonl`` is written whatever it is.
        folder: where tensorboard writes.

    Raises:
        ValueError: another number of processes than asked for is running, a tracker that is not there, or FSDP,
            DeepSpeed and the like.
    """
    if tracker not in TRACKERS:
        raise ValueError(f"tracker: expected one of {', '.join(TRACKERS)}, got {tracker!r}")
    if tracker != "none" and find_spec(tracker) is None:
        raise ValueError(f"tracker: {tracker} is not installed; pip install 'zepad-mm[trackers]'")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
    )
    if "MULTI" not in (kind := accelerator.distributed_type.value) and kind != "NO":
        raise ValueError(
            f"{kind} splits weights over processes, and attacks and checkpoints here want them whole; launch with "
            "--multi_gpu, and save memory by adaptation='lora', gradient_checkpointing or accumulation"
        )
    asked = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise ValueError(
            f"asked for {asked} processes, running as {accelerator.num_processes}: a machine without a GPU also wants "
            f"'accelerate launch --multi_gpu --num_processes {asked} RECIPE ...' or "
            f"'torchrun --nproc-per-node {asked} RECIPE ...' (--cpu starts a single process)"
        )
    return accelerator


def derived_seed(*keys: int | str) -> int:
    """A 63-bit seed from the run's seed and what it is for, the same on every machine."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derived_generator(*keys: int | str) -> torch.Generator:
    """A CPU generator for one purpose at one step: nothing to save in a checkpoint, nothing shared."""
    return torch.Generator().manual_seed(derived_seed(*keys))


@contextmanager
def seeded(device: torch.device, *keys: int | str) -> Iterator[None]:
    """Dropout draws from the global generators: inside the block they are seeded, after it they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(*keys))
        yield


def augment(images: Tensor, kind: str, generator: torch.Generator, share: slice) -> Tensor:
    """Random flips and shifts of the rows ``share`` of a global batch, of which ``images`` (B, 3, H, W) are that share.

    Drawn for the whole global batch, so that every number of processes gives an image the same fate.
    """
    if kind == "none":
        return images
    size = share.stop
    flips = (torch.rand(size, generator=generator) < 0.5)[share].to(images.device)
    images = torch.where(flips[:, None, None, None], images.flip(-1), images)
    if kind == "flip":
        return images
    height, width = images.shape[-2:]
    pad = max(1, min(height, width) // 8)
    shifts = torch.randint(0, 2 * pad + 1, (size, 2), generator=generator)[share].to(images.device)
    padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")
    rows = shifts[:, :1] + torch.arange(height, device=images.device)
    columns = shifts[:, 1:] + torch.arange(width, device=images.device)
    batch = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[batch, channels, rows[:, None, :, None], columns[:, None, None, :]]


@torch.no_grad()
def encode_images(
    encoder: nn.Module, images: Tensor, batch_size: int = 256, accelerator: Accelerator | None = None
) -> Tensor:
    """Features (N, D) of images (N, 3, H, W) in eval mode, each encoded once by one of the processes.

    Always the same batches for the same number of processes, so that a resumed run gets the same bits.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(encoder.parameters()).device
    share = -(-len(images) // world)  # each process takes as many, the last rows twice if need be
    mine = (torch.arange(share) + rank * share).clamp_max(len(images) - 1)
    with frozen(encoder):
        rows = [encoder(images[index].to(device)).float() for index in mine.split(batch_size)]
    features = torch.cat(rows)
    if accelerator is not None and world > 1:
        features = accelerator.gather(features)  # type: ignore[assignment]
    return features[: len(images)]
