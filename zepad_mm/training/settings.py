"""Settings of a tuning run, all but the objective, and of its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from zepad_mm.data import LabelledImages, StoredImages, StreamedImages, load_data, open_images, stream_images
from zepad_mm.utils.config import Config
from zepad_mm.utils.images import Resize
from zepad_mm.utils.validation import check_epsilon

TrainData = LabelledImages | StoredImages | StreamedImages

# settings that change neither the weights nor which of them are kept, and may differ when a run is resumed
UNIDENTIFYING = ("checkpoint_every", "log_every", "resume", "num_workers", "cache_dir", "samples")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Config):
    """Settings of :func:`zepad_mm.training.fit`. The defaults suit full tuning of a small tower on a CPU."""

    epochs: int = 20  # passes over the training images; ignored when steps is given
    steps: int | None = None  # optimiser steps in all
    batch_size: int = 128  # images per optimiser step over all processes together
    optimizer: Literal["adam", "adamw"] = "adamw"  # adam adds weight decay to the gradient, as the released code does
    lr_encoder: float = 1e-4  # highest learning rate of the encoder, or of its adapter
    lr_head: float = 5e-3  # highest learning rate of a head that trains along
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "exponential", "constant"] = "cosine"  # after the warm-up of the rate
    gamma: float = 0.96  # factor per epoch of the exponential schedule
    lr_warmup_steps: int = 0  # linear from 0
    epsilon_warmup_steps: int = 0  # linear from 0 to the defence's epsilon
    # flip_shift: also moved by up to an eighth of the side. photo: flipped, cropped, some recoloured or less sharp
    augment: Literal["none", "flip", "flip_shift", "photo"] = "none"
    bn_mode: Literal["eval", "train"] = "eval"  # eval keeps the running statistics as they are
    ema_decay: float = 0.0  # of the average of the weights that is validated and kept; 0: the weights themselves
    grad_clip: float | None = 1.0  # largest norm of the gradient; None: no clipping
    num_workers: int = 0  # processes that decode the images of a stored or streamed set; 0: the main one does
    accumulation: int = 1  # parts of equal size that a batch is crafted and back-propagated in, for less memory
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass, for less memory
    compile: Literal["no", "inductor", "aot_eager", "cudagraphs"] = "no"  # torch.compile of the encoder, by backend
    cache_dir: str | None = None  # keeps clean targets and text embeddings for other runs; None: in memory
    channels_last: bool = False  # faster convolutions on many CPUs and on tensor cores
    seed: int = 0  # of all randomness
    validation_every: int = 0  # steps; 0: after each epoch. The untuned student is validated too
    validation_attack_steps: int = 5  # PGD on cross-entropy
    validation_epsilon: float | None = None  # None: the defence's
    validation_batch_size: int = 256
    selection: Literal["mean", "clean", "robust", "last"] = "mean"  # of clean and robust accuracy on validation
    checkpoint_every: int = 200  # steps
    log_every: int = 10  # steps
    samples: int = 8  # attacked training images shown in samples/STEP.png at each validation; 0: none
    resume: Literal["auto", "never"] = "auto"  # never refuses a folder that holds a run

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "epochs", "batch_size", "validation_attack_steps", "validation_batch_size", "checkpoint_every", "log_every",
            "accumulation",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in (
            "lr_encoder", "lr_head", "weight_decay", "lr_warmup_steps", "epsilon_warmup_steps", "validation_every",
            "num_workers", "samples",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected at least 1 or none, got {self.steps}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation: a batch of {self.batch_size} has no {self.accumulation} equal parts")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip: expected a positive norm or none, got {self.grad_clip}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number in [0, 1), got {self.ema_decay}")
        if self.validation_epsilon is not None:
            check_epsilon(self.validation_epsilon)

    def lr_factor(self, step: int, total: int, per_epoch: int) -> float:
        """Factor of the learning rate at ``step`` (from 0); a pure function, so that checkpoints need no scheduler."""
        if step < self.lr_warmup_steps:
            return (step + 1) / self.lr_warmup_steps
        if self.schedule == "exponential":
            return self.gamma ** (step // per_epoch)
        if self.schedule == "cosine":
            done = (step - self.lr_warmup_steps) / max(1, total - self.lr_warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0

    def epsilon_factor(self, step: int) -> float:
        """Factor of epsilon at ``step`` (from 0)."""
        return min(1.0, (step + 1) / self.epsilon_warmup_steps) if self.epsilon_warmup_steps else 1.0


@dataclass(frozen=True, kw_only=True)
class DataSettings(Config):
    """Data sets for tuning and validation. Validation images are always held in memory."""

    source: str = "embedded"  # "embedded", a folder of parquet files or class folders, or a name on the Hub
    train_split: str = "train"
    validation_split: str | None = "validation"  # None: a tenth of the training split is held out by the seed
    image_size: int | None = None  # side in pixels that images are stored and attacked at; None: of the encoder
    n_train: int | None = None  # None: all
    n_validation: int | None = 512  # None: all; validation runs PGD, so this is what it costs
    storage: Literal["memory", "disk", "stream"] = "memory"  # disk, stream: for ImageNet; see settings.num_workers
    shuffle_buffer: int = 1000  # rows of a stream that the next one is drawn from

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.storage == "stream" and (self.validation_split is None or self.n_train is not None):
            raise ValueError(
                "storage: a stream is read whole, from its own split; give a validation_split and leave n_train out"
            )

    def load(self, seed: int, resize: Resize | None = None) -> tuple[TrainData, LabelledImages]:
        """Training and validation images, disjoint.

        Args:
            seed: of the samples and of the validation images held out.
            resize: the ``preprocess`` of the encoder, whose rule makes the images square; None: they are squashed, to
                64 pixels where no size is set.

        Raises:
            FileNotFoundError, ValueError: as of :func:`zepad_mm.data.load_data`.
        """
        size = resize.at(self.image_size) if resize else self.image_size or 64
        if self.storage == "stream":
            stream = stream_images(self.source, self.train_split, size, self.shuffle_buffer)
            return stream, self._validation(seed, size)
        if self.storage == "memory":
            train: LabelledImages | StoredImages = load_data(self.source, self.train_split, size, self.n_train, seed)
        else:
            train = open_images(self.source, self.train_split, size).sample(self.n_train, seed)
            train.check_headers()
        if self.validation_split is not None:
            return train, self._validation(seed, size)
        rest, held = train.split(0.1, seed)
        held = held.sample(self.n_validation, seed)
        images = held.fetch(torch.arange(len(held)))
        return rest, LabelledImages(images, held.labels, held.class_names, held.name)

    def _validation(self, seed: int, size: int | Resize) -> LabelledImages:
        assert self.validation_split is not None
        return load_data(self.source, self.validation_split, size, self.n_validation, seed)
