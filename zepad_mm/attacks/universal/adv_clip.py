"""AdvCLIP (Zhou et al., ACM MM 2023): a universal patch that tears images from their texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.losses import info_nce
from zepad_mm.attacks.perturbation import Perturbation
from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, PatchAttack, Surrogate
from zepad_mm.attacks.universal.perturbation_generator import GeneratorAttack
from zepad_mm.attacks.universal.surrogate_heads import cluster


@UNIVERSAL_ATTACKS.register("adv_clip")
@dataclass(frozen=True, kw_only=True)
class AdvCLIP(PatchAttack, GeneratorAttack):
    """AdvCLIP's patch of 3 % of the area: contrastive and topology losses to the clean images and to their texts.

    Maximises ``info_nce(clean, attacked) + text_weight * info_nce(text, attacked)`` and, by ``topology_weight``, the
    same two of :func:`topology`. An image's text is the nearest of ``text_features``; without those, pseudo texts
    stand in: the centres of k-means clusters of the clean features. The paper's discriminator, which makes the patch
    look natural and no stronger, and the squared error on the image are left out.
    """

    epsilon: float = 0.03  # share of the area
    norm: str = "patch"
    place: str = "center"  # "lower_right" as published, or "random": a place of its own for each image
    learning_rate: float = 2e-3  # as for AdvEncoder's patch; 2e-4 as published
    text_weight: float = 1.0  # of texts against images; 5 with pseudo texts is weaker on the embedded CLIP
    topology_weight: float = 0.1  # of the topology losses; the released code weighs contrast 10 to 1
    clusters: int = 10  # pseudo texts, where no texts are given
    text_features: Tensor | None = field(default=None, repr=False, compare=False)  # (T, D), any length; no pairs needed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters < 2:
            raise ValueError(f"clusters: expected at least 2, got {self.clusters}")
        texts = self.text_features
        if texts is not None and (not isinstance(texts, Tensor) or texts.ndim != 2 or len(texts) == 0):
            got = tuple(texts.shape) if isinstance(texts, Tensor) else type(texts).__name__
            raise ValueError(f"text_features: expected a (T, D) tensor of text embeddings, got {got}")

    @property
    def min_images(self) -> int:
        return 2

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        texts = self.texts(surrogate, generator)

        def total_loss(delta: Tensor, batch: Tensor) -> Tensor:
            attacked, losses = surrogate.perturb(delta, batch), []
            for which, encoder in enumerate(surrogate.encoders):
                now, clean = encoder(attacked), surrogate.clean_features(which, batch)
                text = texts[which][..., batch.to(now.device), :]
                contrast = info_nce(now, clean).mean() + self.text_weight * info_nce(now, text).mean()
                shape = topology(now, clean).mean() + self.text_weight * topology(now, text).mean()
                losses.append(contrast + self.topology_weight * shape)
            return -surrogate.record_loss(torch.stack(losses).mean())

        return self.train(surrogate, generator, total_loss)

    def texts(self, surrogate: Surrogate, generator: torch.Generator) -> list[Tensor]:
        """For each encoder the text of each image, (..., N, D)."""
        found = []
        for which in range(len(surrogate.encoders)):
            features = surrogate.all_features(which)
            if self.text_features is None:
                head = cluster(features, self.clusters, generator)
                choices = head.mean + head.centres * (features - head.mean).norm(dim=-1).mean()
            elif self.text_features.shape[-1] != features.shape[-1]:
                raise ValueError(
                    f"text_features: expected width {features.shape[-1]}, that of the encoder's features, "
                    f"got {self.text_features.shape[-1]}; embed the texts by the same CLIP"
                )
            else:
                choices = self.text_features.detach().to(features).expand(*features.shape[:-2], -1, -1)
            nearest = (F.normalize(features, dim=-1) @ F.normalize(choices, dim=-1).transpose(-1, -2)).argmax(-1)
            found.append(choices.gather(-2, nearest[..., None].expand(features.shape)))
        return found

    def to_perturbation(self, delta: Tensor, provenance: Mapping[str, Any]) -> Perturbation:
        texts = "cluster centres" if self.text_features is None else f"{len(self.text_features)} given"
        return super().to_perturbation(delta, {**provenance, "texts": texts})


def neighbours(features: Tensor, others: Tensor) -> Tensor:
    """How surely each of ``others`` (..., B, D) is near each of ``features`` (..., B, D): (..., B, B) in (0, 1).

    UMAP's fuzzy neighbourhood of cosine distances: 1 at the nearest, falling off with the mean distance beyond it
    (UMAP searches the width by bisection).
    """
    distance = 1 - F.normalize(features, dim=-1) @ F.normalize(others, dim=-1).transpose(-1, -2)
    beyond = distance - distance.amin(-1, keepdim=True)
    return (-beyond / beyond.mean(-1, keepdim=True).clamp_min(1e-6)).exp()


def topology(attacked: Tensor, reference: Tensor) -> Tensor:
    """Cross-entropy of two neighbourhoods: of the references among themselves, and of the attacked among them.

    Args:
        attacked, reference: features (..., B, D).

    Returns:
        (..., B) losses; higher where an image's attacked neighbours are not its clean ones.
    """
    truth = neighbours(reference, reference).clamp(1e-4, 1 - 1e-4)
    now = neighbours(attacked, reference).clamp(1e-4, 1 - 1e-4)
    return (truth * (truth / now).log() + (1 - truth) * ((1 - truth) / (1 - now)).log()).sum(-1)
