"""How any backbone becomes an :class:`Encoder`."""

from zepad_mm.encoders import huggingface as _huggingface
from zepad_mm.encoders import open_clip as _open_clip
from zepad_mm.encoders import ssl_checkpoints as _ssl_checkpoints
from zepad_mm.encoders import timm as _timm
from zepad_mm.encoders.base import Encoder, Preprocess, load_encoder
from zepad_mm.encoders.clip import TextEncoder, is_clip, load_clip
from zepad_mm.encoders.fingerprint import Fingerprint, describe_changes, differences, fingerprint
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
from zepad_mm.encoders.sources import BACKENDS, EncoderBackend

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
    "fingerprint",
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
del _huggingface, _open_clip, _ssl_checkpoints, _timm
