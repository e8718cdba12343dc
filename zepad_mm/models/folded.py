"""Faster copies of a frozen model's encoders, so that an attack on the whole model costs what the evaluation's does."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from torch import Tensor

from zepad_mm.encoders import Encoder, optimize_for_inference

log = logging.getLogger(__name__)
Key = tuple[tuple[int, int], ...]


class FoldedEncoders:
    """Copies by :func:`optimize_for_inference`, one for each encoder, made again when weights have changed.

    Copies and pickles of a model start without them.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[Key, Encoder]] = {}

    def get(self, name: str, encoder: Encoder, images: Tensor) -> Encoder:
        """The folded copy of an encoder where the images ask for a gradient and the encoder is frozen; else itself.

        The encoder itself is returned too while it trains, is compiled, or has hooks, which a copy would not run.
        """
        if not (images.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return encoder
        key = _state_of(encoder)
        if key is None:
            return encoder
        if name not in self._made or self._made[name][0] != key:
            with torch.random.fork_rng(devices=[]):
                self._made[name] = (key, optimize_for_inference(encoder, images.shape[-1]))
            log.debug("folded the encoder of %s for gradients", name)
        return self._made[name][1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": {}}


def _state_of(encoder: Encoder) -> Key | None:
    """What changes whenever a weight does; None for an encoder that is not to be folded."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in encoder.modules():
        if module.training or any(getattr(module, kind) for kind in hooks):
            return None
    found = []
    for tensor in itertools.chain(encoder.parameters(), encoder.buffers()):
        if tensor.requires_grad or tensor.is_inference():
            return None
        found.append((tensor.data_ptr(), tensor._version))
    return tuple(found)
