"""Heads: features (B, D) to logits (B, C). Small, and all that changes from task to task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.encoders import TextEncoder
from zepad_mm.utils.registry import Registry

# name -> class(feature_dim, num_classes)
HEADS: Registry[type[nn.Module]] = Registry("head")


@HEADS.register("linear")
class LinearHead(nn.Module):
    """A linear probe: features (B, D) to logits (B, C)."""

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(feature_dim, num_classes)

    @property
    def input_layer(self) -> nn.Linear:
        """The layer that takes the features."""
        return self.layer

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features)


@HEADS.register("mlp")
class MLPHead(nn.Module):
    """The paper's head: two hidden layers as wide as the features, dropout 0.2 after the first. (B, D) to (B, C)."""

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(feature_dim, feature_dim),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(feature_dim, feature_dim),
            nn.ReLU(),
            nn.Linear(feature_dim, num_classes),
        )

    @property
    def input_layer(self) -> nn.Linear:
        """The layer that takes the features."""
        layer = self.layers[0]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


@HEADS.register("zero_shot")
class ZeroShotHead(nn.Module):
    """CLIP's head: scaled cosine to one text embedding per class. Nothing in it is trained.

    Args:
        feature_dim, num_classes: D and C of the text embeddings.

    Attributes:
        text: (C, D) unit-length class embeddings.
        logit_scale: factor on the cosines.
    """

    text: Tensor
    logit_scale: Tensor

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("text", torch.zeros(num_classes, feature_dim))
        self.register_buffer("logit_scale", torch.ones(()))

    @classmethod
    def from_embeddings(cls, text: Tensor, logit_scale: float) -> ZeroShotHead:
        """From (C, D) class embeddings and a scale."""
        head = cls(text.shape[1], text.shape[0]).to(text.device)
        head.text = F.normalize(text.detach().float(), dim=-1)
        head.logit_scale = torch.tensor(float(logit_scale), device=text.device)
        return head

    def forward(self, features: Tensor) -> Tensor:
        return self.logit_scale * F.normalize(features, dim=-1) @ self.text.T


def zero_shot_head(
    text: TextEncoder, class_names: Sequence[str], prompts: str | Sequence[str] = "photo"
) -> ZeroShotHead:
    """A zero-shot head for ``class_names`` from an ensemble of prompts. Raises ValueError for an empty list."""
    return ZeroShotHead.from_embeddings(text.class_embeddings(class_names, prompts), text.logit_scale)
