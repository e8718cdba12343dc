"""A defended model with zero-shot heads for one set of labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from zepad_mm.models.branch import encode
from zepad_mm.models.fusion import Decision
from zepad_mm.models.heads import ZeroShotHead
from zepad_mm.models.zepad import ZePAD


@dataclass(frozen=True)
class Task:
    """Zero-shot heads for one set of labels. The model is not changed: many tasks may share it at the same time.

    Attributes:
        model: the defended model.
        names: the labels in the order of the logits.
        heads: branch name to its zero-shot head for these labels.
        undefended_head: the zero-shot head of the undefended encoder.
    """

    model: ZePAD
    names: tuple[str, ...]
    heads: Mapping[str, ZeroShotHead]
    undefended_head: ZeroShotHead

    def branch_logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to the logits of each branch (N, B, C)."""
        return self.model.branch_outputs(images, self.heads).logits

    def decide(self, images: Tensor) -> Decision:
        """(B, 3, H, W) in [0, 1] to a Decision with fused logits (B, C); differentiable."""
        return self.model.fuse(self.branch_logits(images))

    def defended(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to fused logits (B, C), the target of a white-box attack."""
        return self.decide(images).logits

    def undefended(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to the logits of the undefended encoder (B, C)."""
        return self.undefended_head(encode(self.model.undefended.encoder, images))
