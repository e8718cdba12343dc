"""What a recipe tunes on, from a configuration: in memory, on disk or streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from zepad_mm.data import LabelledImages, StoredImages, load_data, open_images, stream_images
from zepad_mm.training.dataloader import TrainData
from zepad_mm.utils.config import Config


@dataclass(frozen=True, kw_only=True)
class DataSettings(Config):
    """What to tune on, and to validate on. Validation pictures are always held in memory."""

    source: str = "embedded"  # "embedded", a folder of parquet files or class folders, or a name on the Hub
    train_split: str = "train"
    validation_split: str | None = "validation"  # None: a tenth of the training split is held out by the seed
    image_size: int = 64  # side in pixels that pictures are stored at and attacked at; the encoder resizes inside
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

    def load(self, seed: int) -> tuple[TrainData, LabelledImages]:
        """Training and validation pictures, disjoint. Errors as of :func:`zepad_mm.data.load_data`."""
        if self.storage == "stream":
            stream = stream_images(self.source, self.train_split, self.image_size, self.shuffle_buffer)
            return stream, self._validation(seed)
        if self.storage == "memory":
            train: LabelledImages | StoredImages = load_data(
                self.source, self.train_split, self.image_size, self.n_train, seed
            )
        else:
            train = open_images(self.source, self.train_split, self.image_size).sample(self.n_train, seed)
        if self.validation_split is not None:
            return train, self._validation(seed)
        rest, held = train.split(0.1, seed)
        held = held.sample(self.n_validation, seed)
        images = held.fetch(torch.arange(len(held)))
        return rest, LabelledImages(images, held.labels, held.class_names, held.name)

    def _validation(self, seed: int) -> LabelledImages:
        assert self.validation_split is not None
        return load_data(self.source, self.validation_split, self.image_size, self.n_validation, seed)
