"""Clean targets: features of the training pictures under the untuned encoder, computed once, and kept on disk."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from zepad_mm.data import LabelledImages
from zepad_mm.encoders import Encoder
from zepad_mm.files import read_tensors, write_tensors
from zepad_mm.training.checkpoint import crc_of
from zepad_mm.training.processes import encode_images

log = logging.getLogger(__name__)


def clean_targets(
    teacher: Encoder,
    train: LabelledImages,
    indices: Tensor,
    batch_size: int,
    accelerator: Accelerator,
    cache_dir: str | None,
) -> Tensor:
    """(N, D) features of the pictures at ``indices``, zeros elsewhere, on the accelerator's device.

    Args:
        teacher: the untuned encoder.
        indices: rows that the run will see.
        batch_size: of the forward passes.
        cache_dir: folder, seen by all processes, that keeps them for other runs by the encoder's weights and the
            pictures' pixels; None keeps nothing. A damaged file is computed anew.
    """
    images = train.images[indices]
    path = Path(cache_dir) / f"{key_of(teacher, images)}.safetensors" if cache_dir else None
    features = _kept(path, len(images))
    if features is None:
        features = encode_images(teacher, images, batch_size, accelerator)
        if path is not None and accelerator.is_main_process:
            write_tensors(path, {"features": features}, {"source": teacher.source, "data": train.name})
        accelerator.wait_for_everyone()
    table = torch.zeros(len(train), features.shape[1], device=accelerator.device)
    table[indices.to(accelerator.device)] = features.to(accelerator.device)
    return table


def key_of(teacher: Encoder, images: Tensor) -> str:
    """What the features depend on: the encoder's weights and preprocessing, and every pixel."""
    digest = hashlib.blake2b(f"{crc_of(teacher)} {teacher.preprocess}".encode(), digest_size=16)
    digest.update(repr(tuple(images.shape)).encode())
    for part in images.split(1024):
        digest.update(part.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _kept(path: Path | None, size: int) -> Tensor | None:
    if path is None or not path.is_file():
        return None
    try:
        features = read_tensors(path)[0]["features"]
    except (ValueError, KeyError) as error:
        log.warning("%s cannot be used and is written anew: %s", path, error)
        return None
    log.info("clean targets of %d pictures from %s", size, path)
    return features
