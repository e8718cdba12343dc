"""A defended model pointed at labels: what the classifier answers by, and what an attacker would attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.models.fusion import Decision
from zepad_mm.models.heads import ZeroShotHead
from zepad_mm.models.zepad import ZePAD


@dataclass(frozen=True)
class Task:
    """Labels for a model, without changing the model: many tasks may use one at the same time.

    Attributes:
        model: the defended model.
        names: the labels, in the order of the logits.
        heads: for each branch the zero-shot head of these labels.
        plain: the head of the undefended encoder.
    """

    model: ZePAD
    names: tuple[str, ...]
    heads: Mapping[str, ZeroShotHead]
    plain: ZeroShotHead

    def branch_logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to the logits of each branch (N, B, C)."""
        return torch.stack([self.heads[name](encoded(self.model.branch(name).encoder, images)) for name in self.heads])

    def decide(self, images: Tensor) -> Decision:
        """(B, 3, H, W) in [0, 1] to fused logits (B, C) and the evidence, with gradients where they are asked for."""
        return self.model.fuse(self.branch_logits(images))

    def defended(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to fused logits (B, C): what a white-box attacker attacks."""
        return self.decide(images).logits

    def undefended(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to what the public encoder says, (B, C)."""
        return self.plain(encoded(self.model.undefended.encoder, images))


def encoded(encoder: torch.nn.Module, images: Tensor) -> Tensor:
    """Features in the encoder's own precision; heads and fusion are always computed in float32."""
    parameter = next(encoder.parameters())
    return encoder(images.to(parameter.device, parameter.dtype)).float()
