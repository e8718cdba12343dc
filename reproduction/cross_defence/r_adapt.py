"""R-Adapt: an input filter and an anchor in the first block (Nie et al., arXiv 2603.12799).

Implemented from the project page and the abstract: neither code nor the width of the filter nor the share of the anchor
was published in what could be read. The share is the largest that keeps the features of clean images near the original
ones (:func:`choose_share`).
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from reproduction.cross_defence.base import DEFENCES, AuthorsAttack, Defence, Parts, in_batches
from zepad_mm.encoders import Encoder
from zepad_mm.evaluation.subjects import EncoderWithHead
from zepad_mm.utils.validation import check_images

FIRST_BLOCK = re.compile(r"(^|\.)(resblocks|blocks|layers|layer|stages|layer1)\.0$")
ATTENTION = ("attn", "self_attn", "attention", "self_attention")
SHARES = (0.5, 0.4, 0.3, 0.2, 0.1)  # of the anchor, the first that fits is taken
SIMILAR = 0.9  # mean cosine to the original features of clean images that a share must keep


def first_block(encoder: Encoder) -> nn.Module:
    """The first block of a tower: its attention, or the whole block where there is none.

    Raises:
        ValueError: no block under a known name.
    """
    found = [module for name, module in encoder.named_modules() if FIRST_BLOCK.search(name)]
    if not found:
        raise ValueError(
            f"{encoder.source}: R-Adapt found no first block; expected a module named like blocks.0, layers.0 or "
            "stages.0"
        )
    return next((getattr(found[0], name) for name in ATTENTION if hasattr(found[0], name)), found[0])


class RAdapt(Defence):
    """Blurs the image, and mixes the first block's output with a fixed anchor; nothing is trained.

    Args:
        model: encoder with head; copied.
        anchor: output of the first block to mix in, (1, ...); None: of the encoder itself on a white image.
        share: weight of the anchor, in [0, 1].
        sigma: of the Gaussian filter, in pixels at a side of 64.
    """

    attack: AuthorsAttack = "pgd_undefended"

    def __init__(
        self, model: EncoderWithHead, anchor: Tensor | None = None, share: float = 0.5, sigma: float = 0.5
    ) -> None:
        super().__init__()
        self.encoder, self.head = copy.deepcopy(model.encoder), model.head
        self.share, self.sigma = share, sigma * self.encoder.preprocess.image_size / 64
        side, like = self.encoder.preprocess.image_size, next(self.encoder.parameters())
        white = torch.ones(1, 3, side, side, device=like.device)
        self.anchor = first_output(self.encoder, white) if anchor is None else anchor
        first_block(self.encoder).register_forward_hook(self._mix)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """(B, D)."""
        check_images(images)
        side = 2 * max(1, round(2 * self.sigma)) + 1
        return self.encoder(gaussian_blur(images, [side, side], [self.sigma, self.sigma]).clamp(0, 1))

    def _mix(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        mixed = (1 - self.share) * first + self.share * self.anchor.to(first)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def first_output(encoder: Encoder, images: Tensor) -> Tensor:
    """The mean output of an encoder's first block over images, (1, ...)."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = first_block(encoder).register_forward_hook(keep)
    try:
        with torch.no_grad():
            encoder(images)
    finally:
        handle.remove()
    batch_axis = seen[0].shape.index(len(images)) if len(images) > 1 else 0
    return seen[0].mean(batch_axis, keepdim=True)


def choose_share(model: EncoderWithHead, defence: RAdapt, images: Tensor) -> RAdapt:
    """Set the largest of ``SHARES`` that keeps the features of clean images; the smallest where none does."""
    original = in_batches(model.encoder, images)
    for share in SHARES:
        defence.share = share
        if float(F.cosine_similarity(original, in_batches(defence.features, images)).mean()) >= SIMILAR:
            break
    return defence


@DEFENCES.register("r_adapt")
def build(parts: Parts) -> Defence:
    """R-Adapt without training: the anchor is the CLIP's own response to a white image."""
    return choose_share(parts.undefended, RAdapt(parts.undefended), parts.calibration)


@DEFENCES.register("r_adapt_guided")
def build_guided(parts: Parts) -> Defence:
    """R-Adapt guided by the robust encoder: the anchor is its mean response to clean images."""
    anchor = first_output(parts.robust.encoder, parts.calibration[:64])
    return choose_share(parts.undefended, RAdapt(parts.undefended, anchor), parts.calibration)
