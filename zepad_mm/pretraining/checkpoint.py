"""Checkpoint of a pre-training run after each epoch, and the finished encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from zepad_mm.encoders.state_dict import load_state_dict_strict
from zepad_mm.pretraining.base import Learner
from zepad_mm.utils.atomic import replacing_folder
from zepad_mm.utils.io import damage_of, parse_metadata, read_tensors, write_tensors
from zepad_mm.utils.provenance import check_identity
from zepad_mm.utils.wrappers import unwrap, unwrapped


def save_state(
    path: Path, learner: Learner, optimizer: torch.optim.Optimizer, epoch: int, settings: dict[str, Any]
) -> None:
    """Write weights and optimiser state after an epoch, as safetensors."""
    tensors = {f"model.{name}": value for name, value in learner.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entry.items()})
    write_tensors(path, tensors, {"epoch": str(epoch), "config": json.dumps(settings, sort_keys=True)})


def load_state(path: Path, learner: Learner, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> int:
    """Restore a checkpoint; returns the number of epochs done. Raises ValueError if its settings differ."""
    tensors, about = read_tensors(path)
    check_identity(
        parse_metadata(about, "config", path),
        settings,
        path,
        ignore=("out", "data", "more_data", "initial", "threads"),
        remedy="choose a new --out",
    )
    weights = {key[6:]: value for key, value in tensors.items() if key.startswith("model.")}
    load_state_dict_strict(learner.state_dict(), weights, str(path), "it is of another model")
    with damage_of(path):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(about["epoch"])


def save_encoder(encoder: nn.Module, folder: Path, model_args: dict[str, Any]) -> None:
    """Write the encoder in timm's format; the folder holds the old one whole or the new one whole at any moment."""
    encoder = unwrap(encoder)
    with unwrapped(encoder), replacing_folder(folder) as staged:
        plain = encoder.to(memory_format=torch.contiguous_format)
        timm.models.save_for_hf(plain, str(staged), model_args=model_args, safe_serialization=True)
