"""Checkpoints of a run: one safetensors file that is either the old one or the new one, JSON in its metadata.

Stored is what training changes: trainable parameters, their average, buffers, the optimiser's tensors. Random
generators and schedules have no state, because both follow from the settings and the step.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm.data import LabelledImages, StoredImages, StreamedImages
from zepad_mm.defences.base import Defence, Student
from zepad_mm.encoders import has_lora
from zepad_mm.training.average import WeightAverage
from zepad_mm.training.settings import UNIDENTIFYING, TrainData, TrainSettings
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import damage_of, parse_metadata, read_tensors, write_tensors
from zepad_mm.utils.provenance import check_identity

FORMAT = "zepad-mm training 1"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class Position(Config):
    """How far a run is: optimiser steps done, and the best validation so far."""

    step: int
    best_step: int | None
    best: dict[str, Any] | None
    seconds: float


def trained_state(student: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and persistent buffers by name."""
    trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in student.named_parameters()}
    return {
        name: tensor for name, tensor in student.state_dict().items() if name in trainable or name not in parameters
    }


def load_state(student: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy ``state`` into the student. Raises ValueError unless it is exactly what :func:`trained_state` gives."""
    own = trained_state(student)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"{path} does not fit this student: it lacks {missing[:3]}, and has unknown {unknown[:3]}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"{path}: {name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
            tensor.copy_(state[name])


def best_path(out: Path, step: int) -> Path:
    """The file of the weights selected at ``step``: one name per step, so that no checkpoint names newer weights."""
    return out / f"best-{step}.safetensors"


def save_best(out: Path, student: nn.Module, step: int) -> None:
    """Write the selected weights."""
    write_tensors(best_path(out, step), dict(trained_state(student)), {"format": FORMAT, "step": str(step)})


def load_best(out: Path, student: nn.Module, step: int) -> None:
    """Read the selected weights."""
    state, _ = read_tensors(best_path(out, step))
    load_state(student, state, best_path(out, step))


def save_checkpoint(
    out: Path,
    student: nn.Module,
    optimizer: Any,
    average: WeightAverage,
    position: Position,
    identity: dict[str, Any],
) -> None:
    """Write the checkpoint, then remove selected weights that it no longer points at."""
    tensors = {f"model.{name}": tensor for name, tensor in trained_state(student).items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.weights.items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    about = {"position": position.to_dict(), "identity": identity}
    write_tensors(out / CHECKPOINT, tensors, {"format": FORMAT, "about": json.dumps(about, allow_nan=False)})
    for path in out.glob("best-*.safetensors"):
        if position.best_step is None or path != best_path(out, position.best_step):
            path.unlink(missing_ok=True)


def load_checkpoint(
    out: Path, student: nn.Module, optimizer: Any, average: WeightAverage, identity: dict[str, Any]
) -> Position:
    """Load the checkpoint of ``out`` into student, optimiser and average.

    Raises:
        ValueError: damaged, of another format, or of a run with other settings; the message names the first one.
    """
    path = out / CHECKPOINT
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} has the format {metadata.get('format')!r}, expected {FORMAT!r}; give another folder")
    about = parse_metadata(metadata, "about", path)
    with damage_of(path):
        check_identity(about["identity"], identity, path)
        position = Position.from_dict(about["position"])
    model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    load_state(student, model, path)
    missing = [name for name in average.weights if f"average.{name}" not in tensors]
    if missing:
        raise ValueError(f"{path} lacks the average of {missing[:3]}; delete the folder to start again")
    for name, weights in average.weights.items():
        weights.copy_(tensors[f"average.{name}"])
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return position


def crc_of(module: nn.Module, only_frozen: bool = False) -> int:
    """A checksum of parameters and persistent buffers, to tell whether a resumed run starts from the same ones.

    Args:
        only_frozen: leave out what requires a gradient.
    """
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    crc = 0
    for name, tensor in sorted(module.state_dict().items()):
        if only_frozen and name in trainable:
            continue
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def run_identity(
    student: Student,
    train: TrainData,
    validation: LabelledImages | None,
    defence: Defence,
    settings: TrainSettings,
    world: int,
    original: nn.Module | None = None,
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    about_original = {} if original is None else {"original_checksum": crc_of(original)}
    return about_original | {
        "defence": {"name": defence.name, **defence.to_dict()},
        "settings": {key: value for key, value in settings.to_dict().items() if key not in UNIDENTIFYING},
        "train": _data_identity(train, settings, world),
        "validation": None if validation is None else _data_identity(validation, settings, world),
        "source": student.encoder.source,
        # what starts at random is in the checkpoint: an adapter, a head that trains along
        "encoder_checksum": crc_of(student.encoder, only_frozen=has_lora(student.encoder)),
        "head_checksum": crc_of(student.head, only_frozen=True),
    }


def _data_identity(data: TrainData, settings: TrainSettings, world: int) -> dict[str, Any]:
    if isinstance(data, StreamedImages):  # the order of rows depends on the readers
        about = {"name": data.name, "shuffle_buffer": data.shuffle_buffer, "resize": data.resize.to_dict()}
        return about | {"num_workers": settings.num_workers, "processes": world}
    labels = zlib.crc32(data.labels.cpu().contiguous().numpy().data)
    shape = [3, *[data.resize.image_size] * 2] if isinstance(data, StoredImages) else list(data.images.shape[1:])
    return {"name": data.name, "n": len(data), "shape": shape, "labels_checksum": labels}
