"""Metrics and sample images beside ``metrics.jsonl``, and the batch of a non-finite loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from zepad_mm.defences.base import Batch
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import write_tensors
from zepad_mm.utils.isolation import import_isolated

SAMPLES = "samples"


def start_trackers(accelerator: Accelerator, out: Path, about: dict[str, Any]) -> None:
    """Start the trackers that :func:`~zepad_mm.training.make_accelerator` was asked for, once."""
    if accelerator.log_with and not accelerator.trackers:
        run = {"trackio": {"name": out.parent.name if out.name == "run" else out.name}}
        accelerator.init_trackers("zepad", _flat(about), init_kwargs=run)


def track(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """Send one line of the metrics to every tracker."""
    metrics = {key: value for key, value in _flat(line).items() if key != "step" and isinstance(value, int | float)}
    accelerator.log(metrics, step=line["step"])


def write_samples(accelerator: Accelerator, out: Path, step: int, images: Tensor, attacked: Tensor) -> None:
    """Write an image grid: a row each of clean images, attacked images, and ten times the difference.

    Args:
        out: folder of the run; the grid is ``samples/STEP.png`` in it.
        images, attacked: (N, 3, H, W) in [0, 1].
    """
    difference = (0.5 + 10 * (attacked - images)).clamp(0, 1)
    utils = import_isolated("torchvision.utils")
    grid = utils.make_grid(torch.cat([images, attacked, difference]).float().cpu(), nrow=len(images), padding=1)
    with replacing(out / SAMPLES / f"{step}.png") as temporary:
        utils.save_image(grid, temporary, format="png")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({"clean, attacked, 10 x difference": grid[None].numpy()}, step=step)


def check_finite(
    value: Tensor | None, what: str, step: int, batch: Batch, attacked: Tensor, *, out: Path, about: dict[str, Any]
) -> None:
    """Stop when ``value`` is NaN or infinite.

    Args:
        what: "loss" or "gradient".
        step: from 0; the message and the file count from 1.
        out: folder of the run; the batch is left there.
        about: settings that reproduce it, for the file's metadata.

    Raises:
        FloatingPointError: names the step, the rows and the file with the batch, clean and attacked.
    """
    if value is None or bool(torch.isfinite(value)):
        return
    rank = about.get("rank", 0)
    path = out / (f"nonfinite-{step + 1}.safetensors" if not rank else f"nonfinite-{step + 1}-rank-{rank}.safetensors")
    tensors = {"images": batch.images, "labels": batch.labels, "indices": batch.indices, "attacked": attacked}
    if batch.original is not None:
        tensors["original"] = batch.original
    write_tensors(path, tensors, {"about": json.dumps({**about, "step": step + 1, "what": what})})
    rows = ", ".join(map(str, batch.indices[:16].tolist())) + (", ..." if len(batch.indices) > 16 else "")
    raise FloatingPointError(
        f"the {what} is {float(value)} at step {step + 1} (rows {rows} of {about['data']}). The batch, clean and "
        f"attacked, is in {path}; nothing else was written since the last checkpoint. Look at these rows for damaged "
        "images, or start anew with a lower lr_encoder, a longer epsilon_warmup_steps or a grad_clip"
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
