"""Faster copies of frozen networks: adapters and batch norms folded into the weights, fast attention."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zepad_mm.encoders.attention import use_fast_attention
from zepad_mm.encoders.base import Encoder
from zepad_mm.encoders.lora import has_lora, merge_lora
from zepad_mm.utils.seeding import seeded_generator

log = logging.getLogger(__name__)
AnyModule = TypeVar("AnyModule", bound=nn.Module)
SAME = 1e-4  # largest accepted difference of the copy, relative to the largest output


def optimize_for_inference(module: AnyModule, image_size: int = 64) -> AnyModule:
    """A frozen copy of a module, in eval mode, in which every encoder computes the same with fewer operations.

    Attacks and evaluations run a network thousands of times without changing it: folding costs one forward pass and
    saves a third to a half of each. On a CPU the filters of convolutions are stored with the channels last, which
    halves the time of depthwise ones. The module itself is returned where nothing can be folded, or where the outputs
    of the copy differ on random pixels by more than 1e-4 of the largest output.

    Args:
        module: maps (B, 3, H, W) in [0, 1] to a tensor.
        image_size: side of the images that it is traced with.
    """
    like = next(module.parameters(), torch.zeros(()))
    images = torch.rand(2, 3, image_size, image_size, generator=seeded_generator(0))
    # on the CPU in 32 bits: TF32 on GPUs and 16-bit weights round more than folding changes
    lighter = copy.deepcopy(module).eval().requires_grad_(False).to("cpu", torch.float32)
    changed = False
    with torch.no_grad():
        expected = lighter(images)
        for encoder in [part for part in lighter.modules() if isinstance(part, Encoder)]:
            changed |= has_lora(encoder)
            merge_lora(encoder)
            changed |= bool(_fold_batch_norms(encoder, images))
            changed |= bool(use_fast_attention(encoder))
        if not changed:
            return module
        if like.device.type == "cpu":
            lighter = lighter.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch lacks it
        got = lighter(images)
    difference = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= SAME:
        log.warning("folding would change the outputs by %.1e; the network is used as it is", difference)
        return module
    return lighter.to(like.device, like.dtype)


def _fold_batch_norms(encoder: Encoder, images: Tensor) -> int:
    """Fold each batch norm that follows a convolution directly; returns how many were folded."""
    pairs = _convolution_norm_pairs(encoder, images)
    for convolution, norm in pairs.items():
        _fold(convolution, norm)
    replaced = {id(norm) for norm in pairs.values()}
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if id(child) in replaced:
                # timm's norms carry the activation that follows them
                setattr(parent, name, getattr(child, "act", None) or nn.Identity())
    return len(pairs)


def _convolution_norm_pairs(encoder: Encoder, images: Tensor) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """Convolution to the norm behind it, found by running the network: names do not give the order."""
    calls: Counter[nn.Module] = Counter()
    made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    found: dict[nn.Conv2d, nn.BatchNorm2d] = {}

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            made_by[id(output)] = (module, output)
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats and id(inputs[0]) in made_by:
            found[made_by[id(inputs[0])][0]] = module

    known = (nn.Conv2d, nn.BatchNorm2d)
    handles = [part.register_forward_hook(after) for part in encoder.modules() if isinstance(part, known)]
    try:
        encoder(images)
    finally:
        for handle in handles:
            handle.remove()
    return {convolution: norm for convolution, norm in found.items() if calls[convolution] == calls[norm] == 1}


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold the norm's scale into the filters and its shift into the bias, in place."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias
    convolution.weight = nn.Parameter(convolution.weight * scale.view(-1, 1, 1, 1), requires_grad=False)
    convolution.bias = nn.Parameter(bias, requires_grad=False)
