"""What a defence costs for one image, and what the record says of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from reproduction.cross_defence.attacks import Strength
from reproduction.cross_defence.base import Defence
from zepad_mm.encoders import Encoder

ABOUT = ("attack", "random", "constants")  # what the cell of clean images says of a defence


def about(defence: Defence) -> dict[str, Any]:
    """What its authors attacked it with, whether it is random, and its constants."""
    constants = {key: value for key, value in vars(defence).items() if isinstance(value, float | int) and key[0] != "_"}
    constants.pop("training", None)
    return {"attack": defence.attack, "random": defence.random, "constants": constants}


@contextmanager
def _counting(defence: Defence, counts: dict[str, int]) -> Iterator[None]:
    """Count the images that pass its encoders forwards and backwards."""

    def forward(module: Any, inputs: Any, output: Tensor) -> None:
        counts["forward"] += len(output)
        if output.requires_grad:
            output.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        counts["backward"] += len(gradient)

    handles = [part.register_forward_hook(forward) for part in defence.modules() if isinstance(part, Encoder)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cost(defence: Defence, images: Tensor, strength: Strength) -> dict[str, float]:
    """Passes of an encoder per answered image, and milliseconds per image in batches."""
    counts = {"forward": 0, "backward": 0}
    batch = images[: max(1, strength.capacity // defence.views)]
    with torch.no_grad():
        with _counting(defence, counts):
            defence(batch)
        started = _now(images.device)
        defence(batch)
        seconds = _now(images.device) - started
    passes = {f"{key}_passes": round(count / len(batch), 2) for key, count in counts.items()}
    return {**passes, "ms_per_image": round(1000 * seconds / len(batch), 4)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
