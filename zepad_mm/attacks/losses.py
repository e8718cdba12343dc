"""Losses per sample that attacks maximise; one registry serves every gradient attack.

Losses on logits take ``(..., B, C)``: leading axes are branches, whose losses are summed, so that the same attack
targets one branch, a pair or all of them. Losses on features ``(..., B, D)`` compare with the clean features and keep
their leading axes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.utils.registry import Registry

# name -> loss(outputs, target) -> (B,), higher is worse for the defender
LOGIT_LOSSES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("loss on logits")
FEATURE_LOSSES: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("loss on features")


@LOGIT_LOSSES.register("ce")
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; saturates where the model is confident, as CLIP is at its logit scale."""
    return _sum_branches(-logits.log_softmax(-1).gather(-1, _index(logits, labels)).squeeze(-1))


def margin_per_branch(logits: Tensor, labels: Tensor) -> Tensor:
    """Best wrong logit minus the true one (Carlini and Wagner 2017): positive exactly when the prediction is wrong.

    Args:
        logits: (..., B, C).
        labels: (B,) true classes.

    Returns:
        (..., B) margins; leading axes are kept.

    Raises:
        ValueError: fewer than 2 classes.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"model: expected logits of at least 2 classes, got {logits.shape[-1]}")
    index = _index(logits, labels)
    return logits.scatter(-1, index, -torch.inf).amax(-1) - logits.gather(-1, index).squeeze(-1)


@LOGIT_LOSSES.register("margin")
def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """:func:`margin_per_branch`, summed over branches."""
    return _sum_branches(margin_per_branch(logits, labels))


@LOGIT_LOSSES.register("dlr")
def difference_of_logits_ratio(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin divided by the gap of first to third logit (Croce and Hein 2020): scale-invariant. Needs 3 classes."""
    if logits.shape[-1] < 3:
        raise ValueError(f"the dlr loss needs at least 3 classes, got {logits.shape[-1]}; use loss='margin'")
    ordered = logits.sort(-1).values
    gap = (ordered[..., -1] - ordered[..., -3]).clamp_min(1e-12)
    return _sum_branches(margin_per_branch(logits, labels) / gap)


def targeted(logits: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
    """Targeted DLR loss (Croce and Hein 2020) towards the classes ``rivals`` (B,); undivided below 4 classes."""
    gain = (logits.gather(-1, _index(logits, rivals)) - logits.gather(-1, _index(logits, labels))).squeeze(-1)
    if logits.shape[-1] >= 4:
        ordered = logits.sort(-1).values
        gain = gain / (ordered[..., -1] - (ordered[..., -3] + ordered[..., -4]) / 2).clamp_min(1e-12)
    return _sum_branches(gain)


@FEATURE_LOSSES.register("feature_l2")
def feature_l2(features: Tensor, clean: Tensor) -> Tensor:
    """Squared distance to the clean features (the attack that FARE trains against)."""
    return (features - clean).square().sum(-1)


@FEATURE_LOSSES.register("feature_cosine")
def feature_cosine(features: Tensor, clean: Tensor) -> Tensor:
    """One minus the cosine to the clean features (X-Transfer's loss)."""
    return 1 - F.cosine_similarity(features, clean, dim=-1)


@FEATURE_LOSSES.register("feature_kl")
def feature_kl(features: Tensor, clean: Tensor, temperature: float = 0.1) -> Tensor:
    """Divergence of the softmax over unit-length features from the clean one (ETU's loss)."""
    before = (F.normalize(clean, dim=-1) / temperature).log_softmax(-1)
    now = (F.normalize(features, dim=-1) / temperature).log_softmax(-1)
    return (before.exp() * (before - now)).sum(-1)


@FEATURE_LOSSES.register("info_nce")
def info_nce(features: Tensor, clean: Tensor, temperature: float = 0.1) -> Tensor:
    """AdvEncoder's contrastive loss: moves each clean image's features away from its own adversarial ones.

    Cosine logits; positive: the image's own adversarial features; negatives: those of the rest of the batch.
    """
    if features.shape[-2] < 2:
        raise ValueError("info_nce contrasts the images of a batch: expected at least 2, got 1; use 'feature_cosine'")
    logits = F.normalize(clean, dim=-1) @ F.normalize(features, dim=-1).transpose(-1, -2) / temperature
    return -logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1)


def _index(logits: Tensor, labels: Tensor) -> Tensor:
    return labels.expand(logits.shape[:-1]).unsqueeze(-1)


def _sum_branches(per_branch: Tensor) -> Tensor:
    return per_branch.flatten(0, -2).sum(0) if per_branch.ndim > 1 else per_branch
