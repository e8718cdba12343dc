"""Checks before the first step: whether a run is possible, before time is spent on it."""

from __future__ import annotations

from pathlib import Path

import torch

from zepad_mm.data import LabelledImages, StreamedImages
from zepad_mm.defences.base import Defence, Student
from zepad_mm.encoders import has_lora
from zepad_mm.training.checkpoint import CHECKPOINT
from zepad_mm.training.settings import TrainData, TrainSettings
from zepad_mm.utils.validation import check_images


def check_run(
    student: Student,
    train: TrainData,
    validation: LabelledImages | None,
    defence: Defence,
    settings: TrainSettings,
) -> None:
    """Raise ValueError that names what makes this run impossible."""
    if settings.num_workers and isinstance(train, LabelledImages):
        raise ValueError("num_workers: images in memory are decoded already; leave it at 0, or keep the set on disk")
    if settings.cache_dir is not None and defence.needs_original and settings.augment != "none":
        raise ValueError(
            f"cache_dir: with augment={settings.augment!r} no image occurs twice, so no clean target can be stored; "
            "leave cache_dir out, or set augment='none'"
        )
    if settings.accumulation > 1 and (not defence.per_sample or settings.bn_mode == "train"):
        what = f"{defence.name} compares" if not defence.per_sample else "bn_mode='train' normalises over"
        raise ValueError(
            f"accumulation: {what} the images of a batch, which splitting it would change; use accumulation=1, or "
            "gradient_checkpointing to save memory"
        )
    if not isinstance(train, StreamedImages) and len(train) < settings.batch_size:
        raise ValueError(
            f"batch_size: expected at most the {len(train)} training images, got {settings.batch_size}; give more "
            "images, or lower it"
        )
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
    """Raise ValueError if ``out`` holds a run and ``resume`` is "never", or the batch cannot be split."""
    parts = f" in {settings.accumulation} parts each" if settings.accumulation > 1 else ""
    if settings.batch_size % (world * settings.accumulation):
        raise ValueError(f"batch_size: {settings.batch_size} images do not split over {world} processes{parts}")
    if (out / CHECKPOINT).exists() and settings.resume == "never":
        raise ValueError(f"{out} holds a run already; use resume='auto' or give another folder")


@torch.no_grad()
def _num_classes(student: Student) -> int:
    parameter = next(student.encoder.parameters())
    features = torch.zeros(1, student.encoder.feature_dim, device=parameter.device, dtype=parameter.dtype)
    was_training = student.head.training
    classes = student.head.eval().to(parameter.device)(features).shape[-1]
    student.head.train(was_training)
    return int(classes)
