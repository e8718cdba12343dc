"""Before the first step: is this run possible, what identifies it, what trains."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm.data import LabelledImages, StoredImages, StreamedImages
from zepad_mm.defences.base import Batch, Defence, Student
from zepad_mm.encoders import has_lora, set_gradient_checkpointing
from zepad_mm.encoders.attention import use_fast_attention
from zepad_mm.training.checkpoint import CHECKPOINT, crc_of
from zepad_mm.training.dataloader import TrainData
from zepad_mm.training.settings import UNIDENTIFYING, TrainSettings
from zepad_mm.utils.validation import check_images


class Objective(nn.Module):
    """Student and defence as one module: whatever forwards the defence makes, the distributed wrapper sees one."""

    def __init__(self, student: Student, defence: Defence) -> None:
        super().__init__()
        self.student = student
        self.defence = defence

    def forward(
        self, images: Tensor, labels: Tensor, indices: Tensor, original: Tensor | None, attacked: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one share of a batch, and its parts."""
        loss = self.defence.loss(self.student, Batch(images, labels, indices, original), attacked)
        return loss.total, loss.parts


def check_run(
    student: Student,
    train: TrainData,
    validation: LabelledImages | None,
    defence: Defence,
    settings: TrainSettings,
) -> None:
    """Raise ValueError that names what makes this run impossible, before an hour is spent on it."""
    if settings.num_workers and isinstance(train, LabelledImages):
        raise ValueError("num_workers: pictures in memory are decoded already; leave it at 0, or keep the set on disk")
    if settings.cache_dir is not None and defence.needs_original and settings.augment != "none":
        raise ValueError(
            f"cache_dir: with augment={settings.augment!r} no picture comes twice and its clean target cannot be kept; "
            "leave cache_dir out, or set augment='none'"
        )
    if settings.accumulation > 1 and (not defence.per_sample or settings.bn_mode == "train"):
        what = f"{defence.name} compares" if not defence.per_sample else "bn_mode='train' normalises over"
        raise ValueError(
            f"accumulation: {what} the pictures of a batch, which parts of it would change; use accumulation=1, or "
            "gradient_checkpointing to save memory"
        )
    if not isinstance(train, StreamedImages) and len(train) < settings.batch_size:
        raise ValueError(f"batch_size: {settings.batch_size} is more than the {len(train)} training images; lower it")
    classes = _num_classes(student)
    for data, what in ((train, "train"), (validation, "validation")):
        if data is None:
            continue
        if isinstance(data, StreamedImages):
            if defence.trains_head and len(data.class_names) > classes:
                raise ValueError(f"{what}: {len(data.class_names)} classes for a head of {classes}")
            continue
        if len(data) == 0:
            raise ValueError(f"{what}: the data set is empty")
        low, high = int(data.labels.min()), int(data.labels.max())
        if (defence.trains_head or data is validation) and (low < 0 or high >= classes):
            raise ValueError(f"{what}: labels from {low} to {high} for a head of {classes} classes")
        check_images(data.fetch(torch.arange(min(len(data), settings.batch_size))))
    if has_lora(student.encoder) and settings.bn_mode == "train":
        raise ValueError("bn_mode: a LoRA adapter does not hold BN statistics; use bn_mode='eval' with LoRA")
    heads = student.head.parameters() if defence.trains_head else ()
    if not any(parameter.requires_grad for parameter in (*student.encoder.parameters(), *heads)):
        raise ValueError("nothing to train: no parameter of the student requires a gradient")


def check_folder(out: Path, settings: TrainSettings, world: int) -> None:
    """Raise ValueError when the folder holds a run that shall not be resumed, or the batch does not split."""
    parts = f" in {settings.accumulation} parts each" if settings.accumulation > 1 else ""
    if settings.batch_size % (world * settings.accumulation):
        raise ValueError(f"batch_size: {settings.batch_size} images do not split over {world} processes{parts}")
    if (out / CHECKPOINT).exists() and settings.resume == "never":
        raise ValueError(f"{out} holds a run already; use resume='auto' or give another folder")


def identity_of(
    student: Student,
    train: TrainData,
    validation: LabelledImages | None,
    defence: Defence,
    settings: TrainSettings,
    world: int,
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    return {
        "defence": {"name": defence.name, **defence.to_dict()},
        "settings": {key: value for key, value in settings.to_dict().items() if key not in UNIDENTIFYING},
        "train": _identity_of_data(train, settings, world),
        "validation": None if validation is None else _identity_of_data(validation, settings, world),
        "source": student.encoder.source,
        # what starts at random is in the checkpoint: an adapter, a head that trains along
        "encoder_checksum": crc_of(student.encoder, only_frozen=has_lora(student.encoder)),
        "head_checksum": crc_of(student.head, only_frozen=True),
    }


def make_optimizer(student: Student, settings: TrainSettings) -> torch.optim.Optimizer:
    """One optimiser over what requires a gradient, with a rate for the encoder and one for the head."""
    groups = [
        {"params": [p for p in module.parameters() if p.requires_grad], "lr": rate}
        for module, rate in ((student.encoder, settings.lr_encoder), (student.head, settings.lr_head))
    ]
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind([group for group in groups if group["params"]], weight_decay=settings.weight_decay)


def quicken(student: Student, settings: TrainSettings) -> None:
    """What changes how the encoder computes, and not what: its attention, memory layout, recomputation, compilation.

    Raises ValueError for an encoder that cannot recompute.
    """
    use_fast_attention(student.encoder)
    if settings.channels_last:
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.gradient_checkpointing:
        set_gradient_checkpointing(student.encoder)
    if settings.compile != "no":
        student.encoder.backbone.compile(backend=settings.compile)


def training_mode(student: Student, bn_mode: str) -> None:
    """Train mode for what trains; batch normalisation by its running statistics unless asked otherwise."""
    student.train()
    for module in (student.encoder, student.head):
        if not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()
    if bn_mode == "eval":
        for module in student.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


@torch.no_grad()
def _num_classes(student: Student) -> int:
    parameter = next(student.encoder.parameters())
    features = torch.zeros(1, student.encoder.feature_dim, device=parameter.device, dtype=parameter.dtype)
    was_training = student.head.training
    classes = student.head.eval().to(parameter.device)(features).shape[-1]
    student.head.train(was_training)
    return int(classes)


def _identity_of_data(data: TrainData, settings: TrainSettings, world: int) -> dict[str, Any]:
    if isinstance(data, StreamedImages):  # which rows come when depends on who reads
        about = {"name": data.name, "shuffle_buffer": data.shuffle_buffer, "image_size": data.image_size}
        return about | {"num_workers": settings.num_workers, "processes": world}
    labels = zlib.crc32(data.labels.cpu().contiguous().numpy().data)
    shape = [3, data.image_size, data.image_size] if isinstance(data, StoredImages) else list(data.images.shape[1:])
    return {"name": data.name, "n": len(data), "shape": shape, "labels_checksum": labels}
