"""A loss that is no number: what to look at, and everything that reproduces it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zepad_mm.defences.base import Batch
from zepad_mm.utils.io import write_tensors


def check_finite(
    value: Tensor | None, what: str, step: int, batch: Batch, attacked: Tensor, *, out: Path, about: dict[str, Any]
) -> None:
    """Stop when ``value`` is NaN or infinite.

    Args:
        what: "loss" or "gradient".
        step: from 0; the message and the file count from 1.
        out: folder of the run; the batch is left there.
        about: what else tells how it came about, for the file's metadata.

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
        "pictures, or start anew with a lower lr_encoder, a longer epsilon_warmup_steps or a grad_clip"
    )
