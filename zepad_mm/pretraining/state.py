"""What pre-training keeps: its state after an epoch, and in the end the encoder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from zepad_mm.pretraining.base import Learner
from zepad_mm.utils.io import read_tensors, write_tensors


def save_state(
    path: Path, learner: Learner, optimizer: torch.optim.Optimizer, epoch: int, settings: dict[str, Any]
) -> None:
    """Weights and optimiser moments after a whole epoch, as safetensors: nothing is ever pickled."""
    tensors = {f"model.{name}": value for name, value in learner.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entry.items()})
    write_tensors(path, tensors, {"epoch": str(epoch), "config": json.dumps(settings, sort_keys=True)})


def load_state(path: Path, learner: Learner, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> int:
    """The number of whole epochs done. Raises ValueError when the state belongs to other settings."""
    tensors, about = read_tensors(path)
    theirs, ours = json.loads(about["config"]), json.loads(json.dumps(settings))
    other = [key for key in ours if ours[key] != theirs.get(key) and key not in ("out", "data", "threads")]
    if other:
        raise ValueError(f"{path} was written with other settings of {', '.join(other)}; choose a new --out")
    learner.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(about["epoch"])


def save_encoder(encoder: nn.Module, folder: Path, model_args: dict[str, Any]) -> None:
    """timm's own format, written beside and renamed: the folder is never half there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch) / "encoder"
        plain = encoder.to(memory_format=torch.contiguous_format)
        timm.models.save_for_hf(plain, str(fresh), model_args=model_args, safe_serialization=True)
        for file in fresh.iterdir():
            file.chmod(0o644)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
