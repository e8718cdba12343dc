"""Where figures and sample pictures go beside ``metrics.jsonl``: the trackers of accelerate, and a folder of PNGs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from zepad_mm.utils.io import replacing

SAMPLES = "samples"


def start_trackers(accelerator: Accelerator, out: Path, about: dict[str, Any]) -> None:
    """Start what :func:`~zepad_mm.training.make_accelerator` was told to, once; nothing where it was told nothing."""
    if accelerator.log_with and not accelerator.trackers:
        run = {"trackio": {"name": out.parent.name if out.name == "run" else out.name}}
        accelerator.init_trackers("zepad", _flat(about), init_kwargs=run)


def track(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """One line of the metrics to every tracker."""
    figures = {key: value for key, value in _flat(line).items() if key != "step" and isinstance(value, int | float)}
    accelerator.log(figures, step=line["step"])


def write_samples(accelerator: Accelerator, out: Path, step: int, images: Tensor, attacked: Tensor) -> None:
    """A picture of attacks, for the eye: a row each of clean, attacked, and ten times the difference.

    Args:
        out: folder of the run; the picture is ``samples/STEP.png`` in it.
        images, attacked: (N, 3, H, W) in [0, 1].
    """
    from torchvision.utils import make_grid, save_image

    difference = (0.5 + 10 * (attacked - images)).clamp(0, 1)
    grid = make_grid(torch.cat([images, attacked, difference]).float().cpu(), nrow=len(images), padding=1)
    with replacing(out / SAMPLES / f"{step}.png") as temporary:
        save_image(grid, temporary, format="png")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({"clean, attacked, 10 x difference": grid[None].numpy()}, step=step)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
