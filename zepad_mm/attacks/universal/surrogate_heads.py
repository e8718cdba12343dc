"""Surrogate heads: class logits for attackers who have an encoder and unlabelled images only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.universal.base import Surrogate, UniversalAttack

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ClusterHead:
    """Scaled cosines of centred features to cluster centres: features (..., B, D) to logits (..., B, K).

    Attributes:
        mean: (..., 1, D), subtracted from the features.
        centres: (..., K, D) of unit length.
        scale: factor on the cosines.
    """

    mean: Tensor
    centres: Tensor
    scale: float = 10.0

    def __call__(self, features: Tensor) -> Tensor:
        return self.scale * F.normalize(features - self.mean, dim=-1) @ self.centres.transpose(-1, -2)


def cluster(features: Tensor, clusters: int, generator: torch.Generator, rounds: int = 20) -> ClusterHead:
    """A cluster head by spherical k-means.

    Args:
        features: (..., N, D); each leading axis is clustered separately.
        clusters: K; at most N.
        generator: CPU generator that draws the initial centres.
        rounds: Lloyd's iterations.
    """
    mean = features.mean(-2, keepdim=True)
    points = F.normalize(features - mean, dim=-1)
    first = torch.randperm(points.shape[-2], generator=generator)[:clusters].to(points.device)
    centres = points[..., first, :]
    for _ in range(rounds):
        nearest = (points @ centres.transpose(-1, -2)).argmax(-1)
        member = F.one_hot(nearest, centres.shape[-2]).to(points)
        sums = member.transpose(-1, -2) @ points
        filled = member.sum(-2)[..., None] > 0  # an empty cluster keeps its centre
        centres = torch.where(filled, F.normalize(sums, dim=-1), centres)
    return ClusterHead(mean, centres)


@dataclass(frozen=True, kw_only=True)
class PseudoLabelAttack(UniversalAttack):
    """A universal attack on logits, by default on those of pseudo-classes.

    Pseudo-classes are k-means clusters of the encoder's features; no labels are used. A ``head``, any callable from
    features to logits, replaces them; to attack a model that returns logits, pass it as the encoder with
    ``head=torch.nn.Identity()``.
    """

    clusters: int = 10  # number of pseudo-classes, if no head is given
    head: Head | None = None  # features (..., B, D) to logits (..., B, K)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 2:
            raise ValueError(f"clusters: expected at least 2, got {self.clusters}")
        if self.head is not None and not callable(self.head):
            raise ValueError(f"head: expected a callable from features to logits, got {self.head!r:.80}")

    @property
    def min_images(self) -> int:
        return 1 if self.head is not None else 2

    def heads(self, surrogate: Surrogate, generator: torch.Generator) -> list[Head]:
        """One head for each encoder."""
        if self.head is not None:
            return [self.head] * len(surrogate.encoders)
        return [
            cluster(surrogate.all_features(which), self.clusters, generator) for which in range(len(surrogate.encoders))
        ]
