"""Foreign checkpoints, read without unpickling, as one flat table of tensors."""

from __future__ import annotations

import argparse
import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zepad_mm.files import read_tensors


def read_foreign(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a ``.pt``, ``.pth``, ``.ckpt``, ``.tar`` or ``.safetensors`` file, nested names joined by dots.

    ``{"state_dict": {"backbone.conv1.weight": ...}}`` gives ``state_dict.backbone.conv1.weight``. Optimiser states,
    numbers and texts are no weights and are passed over.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, or needs Python objects that are never unpickled here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint (.pt, .pth, .ckpt, .tar, .safetensors)")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        # a Namespace is a bag of settings without code; MoCo, DINO and SupCon store theirs beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise ValueError(
            f"{path} holds more than tensors, and unpickling it could run any code: {reason.strip()[:200]}. Where you "
            "trust it, write its state dict alone: torch.save(torch.load(path, weights_only=False)['state_dict'], new)"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or no checkpoint of torch: {first_line}") from error
    tensors = _flat(content)
    if not tensors:
        raise ValueError(f"{path} holds no named tensors; expected a state dict, got {type(content).__name__}")
    return tensors


def _flat(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str):  # an optimiser's state is numbered
            continue
        if isinstance(value, Tensor):
            found[name] = value
        else:
            found |= {f"{name}.{key}": tensor for key, tensor in _flat(value).items()}
    return found


def summary(names: Iterable[str]) -> str:
    """Names of tensors in one line, grouped by what stands before their last two parts: every group is named."""
    groups = Counter(name.rsplit(".", 2)[0] if name.count(".") >= 2 else name for name in names)
    merged: Counter[str] = Counter()
    for group, count in groups.items():
        # layer1.0.conv1 and its kin go under the part that stands before the first number
        parts = group.split(".")
        first_number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
        merged[".".join(parts[: max(1, first_number)])] += count
    return ", ".join(f"{name} ({count})" for name, count in sorted(merged.items())) or "nothing"
