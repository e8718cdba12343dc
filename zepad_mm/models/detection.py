"""Suspicion scores from the outputs of the branches; higher means more suspicious. All but the gate's need no training.

The branches were tuned differently, so a perturbation made for one of them drives them apart. A detector is advisory:
attackers who know it lower the score while keeping the wrong answer, and every report includes that attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zepad_mm.utils.registry import Registry

# the paper's rule: adversarial when the robust branches are more confident than the benign ones by this much
PAPER_GAP = 0.1
GATE_SCORE = "feature_gate"  # needs a model with a gate

# name -> score(branch_logits (N, B, C), benign (N,)) -> (B,); a model with a gate has its logit z in one more row
SCORES: Registry[Callable[[Tensor, Sequence[bool]], Tensor]] = Registry("suspicion score")


@SCORES.register("confidence_gap")
def confidence_gap(branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
    """The paper's gap: mean max-softmax of the robust branches minus that of the benign ones, in [-1, 1]."""
    robust, clean = _probabilities(branch_logits, benign)
    return robust.amax(-1).mean(0) - clean.amax(-1).mean(0)


@SCORES.register("jensen_shannon")
def jensen_shannon(branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
    """Jensen-Shannon divergence, in nats, between the mean robust and the mean benign distribution; [0, log 2]."""
    robust, clean = (group.mean(0) for group in _probabilities(branch_logits, benign))
    return entropy((robust + clean) / 2) - (entropy(robust) + entropy(clean)) / 2


@SCORES.register("all_branch_divergence")
def all_branch_divergence(branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
    """Generalised Jensen-Shannon divergence over all N branches, in nats: the roles do not matter; [0, log N]."""
    probabilities = branch_logits[: len(benign)].softmax(-1)
    return entropy(probabilities.mean(0)) - entropy(probabilities).mean(0)


@SCORES.register("symmetric_kl")
def symmetric_kl(branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
    """KL(robust, benign) + KL(benign, robust) of the mean distributions, in nats; unbounded."""
    robust, clean = (group.mean(0).clamp_min(1e-12) for group in _probabilities(branch_logits, benign))
    return ((robust - clean) * (robust.log() - clean.log())).sum(-1)


@SCORES.register(GATE_SCORE)
def feature_gate(branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
    """The logit z of the model's gate, from the features of the branches; unbounded. Raises ValueError without one."""
    if len(branch_logits) != len(benign) + 1:
        raise ValueError("the score 'feature_gate' needs a model with a gate; this one has none")
    return branch_logits[len(benign), :, 0]


def score_names(gated: bool) -> list[str]:
    """Names of the scores that a model with or without a gate has."""
    return [name for name in SCORES if gated or name != GATE_SCORE]


def threshold_at(clean_scores: Tensor, false_positive_rate: float) -> float:
    """The score that at most this share of clean validation images exceeds. Raises ValueError without images."""
    if clean_scores.numel() == 0:
        raise ValueError("threshold_at: expected clean validation scores, got none")
    ordered = clean_scores.flatten().sort(descending=True).values
    allowed = int(false_positive_rate * len(ordered))
    return float(ordered[min(allowed, len(ordered) - 1)])


def _probabilities(branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """(robust, benign) probabilities; if one kind is missing, the other takes its place and every score is 0."""
    probabilities = branch_logits[: len(benign)].softmax(-1)
    if all(benign) or not any(benign):
        return probabilities, probabilities
    robust, clean = ([row for row, own in enumerate(benign) if own == kind] for kind in (False, True))
    return probabilities[robust], probabilities[clean]


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis; the floor keeps the gradient finite where a probability underflows."""
    return torch.special.entr(probabilities.clamp_min(1e-12)).sum(-1)
