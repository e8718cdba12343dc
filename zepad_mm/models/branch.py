"""A branch of a defended model: an encoder, as published or tuned, with a head.

Branches have one of two roles. ``robust`` branches were tuned on adversarial images (MPAE in the paper); ``benign``
branches never saw one (BMP in the paper).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zepad_mm.encoders import Encoder
from zepad_mm.models.config import Adaptation, BranchConfig, Role
from zepad_mm.models.gate import FeatureGate, with_gate

__all__ = ["Adaptation", "Branch", "BranchConfig", "BranchOutputs", "Role", "encode", "run_branches"]


@dataclass(frozen=True)
class BranchOutputs:
    """What the branches of a model give for the same images, in the order of its branches.

    Attributes:
        features: for each of the N branches (B, D), what its encoder gives; D may differ between branches.
        logits: (N, B, C), what its head makes of them.
        gate: (B,), the logit z of the model's gate; None for a model without one.
    """

    features: tuple[Tensor, ...]
    logits: Tensor
    gate: Tensor | None = None

    @property
    def stacked(self) -> Tensor:
        """What fusion rules and scores read: the logits and, for a model with a gate, z; (N, B, C) or (N + 1, B, C)."""
        return with_gate(self.logits, self.gate)


def encode(encoder: nn.Module, images: Tensor) -> Tensor:
    """Features, computed on the encoder's device in its precision, and returned in float32 for heads and fusion."""
    parameter = next(encoder.parameters())
    return encoder(images.to(parameter.device, parameter.dtype)).float()


def run_branches(
    branches: Sequence[Branch],
    images: Sequence[Tensor],
    gate: FeatureGate | None = None,
    heads: Sequence[nn.Module] | None = None,
    encoders: Sequence[nn.Module] | None = None,
) -> BranchOutputs:
    """Features and logits of each branch, and the gate's logit, differentiable.

    Args:
        branches: at least one.
        images: (B, 3, H, W) in [0, 1] for each branch: the same ones, resized for its encoder or not.
        gate: what reads the features of these branches.
        heads: for each branch the head to use in place of its own.
        encoders: for each branch the encoder to use in place of its own.
    """
    used = [branch.encoder for branch in branches] if encoders is None else encoders
    features = tuple(encode(encoder, own) for encoder, own in zip(used, images, strict=True))
    if heads is None:
        logits = [branch.logits(own) for branch, own in zip(branches, features, strict=True)]
    else:
        logits = [head(own) for head, own in zip(heads, features, strict=True)]
    z = None if gate is None else gate.read(features, [branch.role == "benign" for branch in branches])
    return BranchOutputs(features, torch.stack(logits), z)


class Branch(nn.Module):
    """An encoder with a head: images (B, 3, H, W) in [0, 1] to logits (B, C)."""

    def __init__(self, config: BranchConfig, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.head = head

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def role(self) -> str:
        return self.config.role

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self.encoder(images))

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) features of the encoder to (B, C); in 32 bits or more whatever type the weights were cast to."""
        like = next(itertools.chain(self.head.parameters(), self.head.buffers()), features)
        logits = self.head(features if torch.is_autocast_enabled(features.device.type) else features.to(like.dtype))
        return logits.float() if like.dtype in (torch.float16, torch.bfloat16) else logits
