"""Outputs of the untuned model, computed once and cached on disk: clean targets, and embeddings of class names."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from zepad_mm.attacks.base import frozen
from zepad_mm.data import LabelledImages
from zepad_mm.encoders import Encoder, TextEncoder
from zepad_mm.encoders.prompts import clean_name, templates_of
from zepad_mm.training.checkpoint import crc_of
from zepad_mm.utils.io import read_tensors, write_tensors

log = logging.getLogger(__name__)


def clean_targets(
    teacher: Encoder,
    train: LabelledImages,
    indices: Tensor,
    batch_size: int,
    accelerator: Accelerator,
    cache_dir: str | None,
) -> Tensor:
    """(N, D) features of the images at ``indices``, zeros elsewhere, on the accelerator's device.

    Args:
        teacher: the untuned encoder.
        indices: rows that the run will see.
        batch_size: of the forward passes.
        cache_dir: folder, seen by all processes, that keeps them for other runs by the encoder's weights and the
            images' pixels; None keeps nothing. A damaged file is recomputed.
    """
    images = train.images[indices]
    path = _path(cache_dir, teacher, str(teacher.preprocess), images.split(1024)) if cache_dir else None
    features = _read_cached(path, (len(images), teacher.feature_dim))
    if features is None:
        features = encode_images(teacher, images, batch_size, accelerator)
        if path is not None and accelerator.is_main_process:
            write_tensors(path, {"features": features}, {"source": teacher.source, "data": train.name})
        accelerator.wait_for_everyone()
    table = torch.zeros(len(train), features.shape[1], device=accelerator.device)
    table[indices.to(accelerator.device)] = features.to(accelerator.device)
    return table


def class_embeddings(
    text: TextEncoder, class_names: Sequence[str], prompts: str | Sequence[str], feature_dim: int, cache_dir: str | None
) -> Tensor:
    """:meth:`TextEncoder.class_embeddings` (C, D), kept in ``cache_dir`` by the tower's weights and its tokens.

    Args:
        feature_dim: D, which a file must have to be read; it is recomputed otherwise.
        cache_dir: as of :func:`clean_targets`. Each process reads or computes for itself: they may start at any time.
    """
    if not cache_dir:
        return text.class_embeddings(class_names, prompts)
    templates = templates_of(prompts)
    tokens = text.tokenizer([template.format(clean_name(name)) for name in class_names for template in templates])
    path = _path(cache_dir, text, str(templates), tokens.values() if isinstance(tokens, Mapping) else (tokens,))
    embeddings = _read_cached(path, (len(class_names), feature_dim))
    if embeddings is None:
        embeddings = text.class_embeddings(class_names, prompts).float()
        write_tensors(path, {"features": embeddings}, {"source": text.source})
    return embeddings


def _path(cache_dir: str, module: nn.Module, about: str, tensors: Iterable[Tensor]) -> Path:
    """A file named after what features depend on: weights, layer types (QuickGELU has no weight), and the input."""
    kinds = sorted({type(layer).__name__ for layer in module.modules()})
    digest = hashlib.blake2b(f"{crc_of(module)} {kinds} {about}".encode(), digest_size=16)
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return Path(cache_dir) / f"{digest.hexdigest()}.safetensors"


def _read_cached(path: Path | None, shape: tuple[int, int]) -> Tensor | None:
    """Features that an earlier run stored; None if there are none, or they are damaged or not float32 of this shape."""
    if path is None or not path.is_file():
        return None
    try:
        features = read_tensors(path)[0]["features"]
        if features.shape != shape or features.dtype != torch.float32:
            raise ValueError(f"features {tuple(features.shape)} {features.dtype}, expected {shape} torch.float32")
    except (ValueError, KeyError) as error:
        log.warning("%s cannot be used and is recomputed: %s", path, error)
        return None
    log.info("features of %d from %s", len(features), path)
    return features


@torch.no_grad()
def encode_images(
    encoder: nn.Module, images: Tensor, batch_size: int = 256, accelerator: Accelerator | None = None
) -> Tensor:
    """Features (N, D) of images (N, 3, H, W) in eval mode, each encoded once by one of the processes.

    Always the same batches for the same number of processes, so that a resumed run gets the same bits.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(encoder.parameters()).device
    share = -(-len(images) // world)  # each process takes as many, the last rows twice if need be
    mine = (torch.arange(share) + rank * share).clamp_max(len(images) - 1)
    with frozen(encoder):
        rows = [encoder(images[index].to(device)).float() for index in mine.split(batch_size)]
    features = torch.cat(rows)
    if accelerator is not None and world > 1:
        features = accelerator.gather(features)  # type: ignore[assignment]
    return features[: len(images)]
