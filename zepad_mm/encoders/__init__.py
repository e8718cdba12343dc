"""How any backbone becomes an :class:`Encoder`. What needs torch is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zepad_mm.encoders import backends as _backends  # registers the kinds
from zepad_mm.encoders.sources import BACKENDS, EncoderBackend
from zepad_mm.utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from zepad_mm.encoders.base import Encoder, Preprocess, load_encoder
    from zepad_mm.encoders.clip import TextEncoder, is_clip, load_clip
    from zepad_mm.encoders.fingerprint import Fingerprint, describe_changes, differences
    from zepad_mm.encoders.gradient_checkpointing import set_gradient_checkpointing
    from zepad_mm.encoders.inference import optimize_for_inference
    from zepad_mm.encoders.lora import (
        LoraSettings,
        add_lora,
        count_parameters,
        folded_lora,
        has_lora,
        load_lora,
        merge_lora,
    )
    from zepad_mm.encoders.shared_trunk import SharedTrunk

_HOMES = {
    "Encoder": "base",
    "Fingerprint": "fingerprint",
    "LoraSettings": "lora",
    "Preprocess": "base",
    "SharedTrunk": "shared_trunk",
    "TextEncoder": "clip",
    "add_lora": "lora",
    "count_parameters": "lora",
    "describe_changes": "fingerprint",
    "differences": "fingerprint",
    "folded_lora": "lora",
    "has_lora": "lora",
    "is_clip": "clip",
    "load_clip": "clip",
    "load_encoder": "base",
    "load_lora": "lora",
    "merge_lora": "lora",
    "optimize_for_inference": "inference",
    "set_gradient_checkpointing": "gradient_checkpointing",
}

__all__ = [
    "BACKENDS",
    "Encoder",
    "EncoderBackend",
    "Fingerprint",
    "LoraSettings",
    "Preprocess",
    "SharedTrunk",
    "TextEncoder",
    "add_lora",
    "count_parameters",
    "describe_changes",
    "differences",
    "folded_lora",
    "has_lora",
    "is_clip",
    "load_clip",
    "load_encoder",
    "load_lora",
    "merge_lora",
    "optimize_for_inference",
    "set_gradient_checkpointing",
]

__getattr__ = lazy_attributes(__name__, _HOMES)
del _backends
