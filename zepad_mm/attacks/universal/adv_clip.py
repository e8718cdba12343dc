"""AdvCLIP (Zhou et al., ACM MM 2023): a universal patch against image-text matching."""

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
    """AdvCLIP: a patch of 3 % of the area by contrastive and topology losses to clean images and texts.

    Maximises ``info_nce(clean, adversarial) + text_weight * info_nce(text, adversarial)`` and, by ``topology_weight``,
    the same two terms of :func:`topology`. The text of an image is the nearest of ``text_features``; without those, the
    centres of k-means clusters of the clean features serve as pseudo texts. The paper's discriminator, which makes the
    patch look natural but not stronger, and its squared error on the image are omitted.
    """

    epsilon: float = 0.03  # share of the area
    norm: str = "patch"
    place: str = "center"  # "lower_right" as published, or "random", drawn for each image
    learning_rate: float = 2e-3  # as for AdvEncoder's patch; 2e-4 as published
    text_weight: float = 1.0  # weight of the texts; 5 with pseudo texts is weaker on the embedded CLIP
    topology_weight: float = 0.1  # weight of the topology losses, as in the released code
    clusters: int = 10  # number of pseudo texts, if no texts are given
    text_features: Tensor | None = field(
        default=None, repr=False, compare=False
    )  # (T, D), need not be paired with the images

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
            adversarial, losses = surrogate.perturb(delta, batch), []
            for which, encoder in enumerate(surrogate.encoders):
                features, clean = encoder(adversarial), surrogate.clean_features(which, batch)
                text = texts[which][..., batch.to(features.device), :]
                contrast = info_nce(features, clean).mean() + self.text_weight * info_nce(features, text).mean()
                shape = topology(features, clean).mean() + self.text_weight * topology(features, text).mean()
                losses.append(contrast + self.topology_weight * shape)
            return -surrogate.record_loss(torch.stack(losses).mean())

        return self.train(surrogate, generator, total_loss)

    def texts(self, surrogate: Surrogate, generator: torch.Generator) -> list[Tensor]:
        """The text features of each image for each encoder, (..., N, D)."""
        texts = []
        for which in range(len(surrogate.encoders)):
            features = surrogate.all_features(which)
            if self.text_features is None:
                head = cluster(features, self.clusters, generator)
                choices = head.mean + head.centres * (features - head.mean).norm(dim=-1).mean()
            elif self.text_features.shape[-1] != features.shape[-1]:
                raise ValueError(
                    f"text_features: expected width {features.shape[-1]}, that of the encoder's features, "
                    f"got {self.text_features.shape[-1]}; embed the texts with the same CLIP"
                )
            else:
                choices = self.text_features.detach().to(features).expand(*features.shape[:-2], -1, -1)
            nearest = (F.normalize(features, dim=-1) @ F.normalize(choices, dim=-1).transpose(-1, -2)).argmax(-1)
            texts.append(choices.gather(-2, nearest[..., None].expand(features.shape)))
        return texts

    def to_perturbation(self, delta: Tensor, provenance: Mapping[str, Any]) -> Perturbation:
        texts = "cluster centres" if self.text_features is None else f"{len(self.text_features)} given"
        return super().to_perturbation(delta, {**provenance, "texts": texts})


def neighbours(features: Tensor, others: Tensor) -> Tensor:
    """The fuzzy membership of ``others`` (..., B, D) in the neighbourhood of ``features``: (..., B, B) in (0, 1).

    As in UMAP, on cosine distances: 1 at the nearest, decaying with the distance beyond it in units of its mean (UMAP
    finds the width by bisection).
    """
    distance = 1 - F.normalize(features, dim=-1) @ F.normalize(others, dim=-1).transpose(-1, -2)
    beyond = distance - distance.amin(-1, keepdim=True)
    return (-beyond / beyond.mean(-1, keepdim=True).clamp_min(1e-6)).exp()


def topology(adversarial: Tensor, reference: Tensor) -> Tensor:
    """Divergence of the adversarial features' neighbourhoods among the references from the references' own.

    Args:
        adversarial, reference: features (..., B, D).

    Returns:
        (..., B) losses; higher where the neighbours differ.
    """
    truth = neighbours(reference, reference).clamp(1e-4, 1 - 1e-4)
    estimate = neighbours(adversarial, reference).clamp(1e-4, 1 - 1e-4)
    return (truth * (truth / estimate).log() + (1 - truth) * ((1 - truth) / (1 - estimate)).log()).sum(-1)
