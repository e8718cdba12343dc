"""Gradient checkpointing: activations are recomputed in the backward pass, for less memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zepad_mm.encoders.base import Encoder
from zepad_mm.encoders.shared_trunk import shares_trunk


def set_gradient_checkpointing(encoder: Encoder, enabled: bool = True) -> Encoder:
    """Switch gradient checkpointing on or off, in place. Models of transformers recompute in training mode only.

    Raises:
        ValueError: the library has no switch for this backbone, or one that does nothing or fails; or the encoder
            shares a trunk.
    """
    if enabled and shares_trunk(encoder):
        raise ValueError(
            f"{encoder.source} shares a trunk, which cannot recompute; train it before ZePAD.share_trunk()"
        )
    if not _switch(encoder.backbone, enabled):
        raise ValueError(
            f"{encoder.source}: {_name(encoder)} has no gradient checkpointing; use smaller batches and accumulation"
        )
    if enabled:
        try:
            works = _recomputes(encoder)
        except (TypeError, RuntimeError) as error:  # open_clip 3.3 with blocks of type "custom"
            _switch(encoder.backbone, False)
            raise ValueError(f"{encoder.source}: its gradient checkpointing does not run: {error}") from error
        if not works:  # open_clip's ModifiedResNet has the method and nothing in it
            raise ValueError(f"{encoder.source}: the gradient checkpointing of {_name(encoder)} recomputes nothing")
    return encoder


def _name(encoder: Encoder) -> str:
    backbone: Any = encoder.backbone
    inner = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    return type(getattr(inner, "model", inner)).__name__


def _switch(backbone: nn.Module, enabled: bool) -> bool:
    """Use the switch of the outermost module that has one; False if none has."""
    for module in backbone.modules():
        found: Any = module
        if hasattr(found, "gradient_checkpointing_enable"):  # transformers
            model = getattr(found, "vision_model", found)  # the whole CLIP would look for its text tower
            if not model.supports_gradient_checkpointing:
                return False
            if enabled:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
            return True
        if hasattr(found, "set_grad_checkpointing"):  # timm and open_clip
            found.set_grad_checkpointing(enabled)
            return True
    return False


def _recomputes(encoder: Encoder) -> bool:
    """Whether a backward pass runs any module again. Modes, statistics, gradients and random state are kept."""
    backbone, size = encoder.backbone, encoder.preprocess.image_size
    like = next(backbone.parameters())
    modes = {module: module.training for module in backbone.modules()}
    calls = 0

    def count(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1

    hooks: list[Any] = []
    with torch.random.fork_rng():
        try:
            backbone.train()
            for module in modes:
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            pixels = torch.zeros(2, 3, size, size, device=like.device, dtype=like.dtype, requires_grad=True)
            loss = backbone(pixels).sum()
            hooks = [module.register_forward_pre_hook(count) for module in modes]
            torch.autograd.grad(loss, pixels)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes.items():
                module.training = mode
    return calls > 0
