"""Fusion rules: branch logits to fused logits. Every rule is smooth in the logits, so gradients are not masked.

A rule takes ``branch_logits (N, B, C)`` and for each branch whether it is benign, and gives fused logits (B, C) and the
weight of each branch for each image (N, B), summing to 1 over branches. For rules that need a gate, its logit z is one
more row (N + 1, B, C), see :func:`zepad_mm.models.gate.with_gate`. The roles are plain booleans, not a tensor:
what depends on them alone is decided when a model is compiled or exported, not for each image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.models.config import GATED_RULE, GateConfig
from zepad_mm.models.detection import GATE_SCORE, SCORES, entropy
from zepad_mm.utils.config import Config
from zepad_mm.utils.registry import Registry

# name -> rule class; its fields are the constants
RULES: Registry[type[Rule]] = Registry("fusion rule")


@dataclass(frozen=True)
class Decision:
    """Fused logits with the evidence behind them.

    Attributes:
        logits: (B, C), fused.
        weights: (N, B), of each branch for each image, summing to 1 over N.
        confidences: (N, B), max softmax of each branch, in [0, 1].
        score: (B,) suspicion score, higher for more suspicious inputs; see :mod:`zepad_mm.models.detection`.
        gate: (B,) logit z of the gate, higher for images that look attacked; None for a model without one.
    """

    logits: Tensor
    weights: Tensor
    confidences: Tensor
    score: Tensor
    gate: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Rule(Config, ABC):
    """A fusion rule with its constants."""

    needs_gate: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """(N, B, C) logits and N roles to fused logits (B, C) and weights (N, B)."""

    def benign_bound(self, branch_logits: Tensor, benign: Sequence[bool]) -> Tensor | None:
        """(B,) the largest share of the fused probabilities that the benign branches can take, whatever their outputs.

        None where the rule has no such bound, as when it mixes logits, whose size a branch is free to choose.
        """
        return None


def rfdm_weights(branch_logits: Tensor, k: float) -> Tensor:
    """The paper's confidence weights: c = m exp(k (m - 1/2)) of each max softmax m, normalised over branches."""
    confidence = branch_logits.softmax(-1).amax(-1)
    return _normalised(confidence * (k * (confidence - 0.5)).exp())


@RULES.register("rfdm")
@dataclass(frozen=True, kw_only=True)
class RFDM(Rule):
    """The paper's Robust Federal Decision Mechanism: confidence weights on raw logits (its Eqs. 7-10)."""

    k: float = 3.0  # how steeply confidence counts; 0 gives weights proportional to it

    def __call__(self, branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
        return _mix_logits(branch_logits, rfdm_weights(branch_logits, self.k))


@RULES.register("rfdm_probability")
@dataclass(frozen=True, kw_only=True)
class RFDMProbability(Rule):
    """RFDM's weights on probabilities: a branch cannot outvote the others by the size of its logits."""

    k: float = 3.0  # as in RFDM

    def __call__(self, branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
        return _mix_probabilities(branch_logits, rfdm_weights(branch_logits, self.k))

    def benign_bound(self, branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
        surest = 1.0 if self.k >= -1 else -1 / self.k  # where m exp(k (m - 1/2)) is largest for m in (0, 1]
        most = sum(benign) * surest * math.exp(self.k * (surest - 0.5))
        confidence = branch_logits[_rows(benign, False)].softmax(-1).amax(-1)
        return most / (most + (confidence * (self.k * (confidence - 0.5)).exp()).sum(0))


@RULES.register("equal")
@dataclass(frozen=True, kw_only=True)
class Equal(Rule):
    """Mean of the logits."""

    def __call__(self, branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
        return _mix_logits(branch_logits, _normalised(torch.ones_like(branch_logits[..., 0])))


@RULES.register("entropy")
@dataclass(frozen=True, kw_only=True)
class Entropy(Rule):
    """Logits weighted by log C - H, the entropy of each branch below its maximum. (The paper's code inverts this.)"""

    def __call__(self, branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
        known = math.log(branch_logits.shape[-1]) - entropy(branch_logits.softmax(-1))
        return _mix_logits(branch_logits, _normalised(known.clamp_min(0) + 1e-6))


@RULES.register("bounded_benign")
@dataclass(frozen=True, kw_only=True)
class BoundedBenign(Rule):
    """Probabilities with a fixed, small weight on the benign branches, which bounds their influence.

    Where the robust branches' margin (in probability) times their weight exceeds the benign weight, no attack on a
    benign branch can change the answer.
    """

    benign_weight: float = 0.2  # in [0, 1], shared by the benign branches; the rest is shared by the robust ones
    sharpness: float = 1.0  # factor on the robust logits: above 1, a robust branch counts where it is sure

    def __call__(self, branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
        weights = _role_weights(branch_logits, benign, self.benign_weight)
        return _mix_probabilities(_scaled(branch_logits, benign, self.sharpness), weights)

    def benign_bound(self, branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
        return _role_weights(branch_logits, benign, self.benign_weight)[_rows(benign, True)].sum(0)


@RULES.register("capped_rfdm")
@dataclass(frozen=True, kw_only=True)
class CappedRFDM(Rule):
    """RFDM's weights on probabilities, the benign share cut off smoothly at ``cap``."""

    k: float = 3.0  # as in RFDM
    cap: float = 0.35  # most that the benign branches get together

    def __call__(self, branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
        weights = rfdm_weights(branch_logits, self.k)
        if all(benign) or not any(benign):
            return _mix_probabilities(branch_logits, weights)
        mask = torch.tensor(benign, device=weights.device).view(-1, 1)
        share = (weights * mask).sum(0)
        kept = self.cap * torch.tanh(share / self.cap)  # below the cap almost the share itself, never above
        scale = torch.where(mask, kept / share, (1 - kept) / (1 - share).clamp_min(1e-12))
        return _mix_probabilities(branch_logits, weights * scale)

    def benign_bound(self, branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
        bound = float(all(benign)) if all(benign) or not any(benign) else min(1.0, self.cap)
        return branch_logits.new_full(branch_logits.shape[1:2], bound)


@RULES.register("mixed_nuts")
@dataclass(frozen=True, kw_only=True)
class MixedNUTS(Rule):
    """After Bai et al. 2024: standardise the robust logits, sharpen them where they are sure, mix probabilities.

    The sharpening flattens gradients: attacked only through itself this rule looks better than the branch that
    carries it. Score it on the other rules' examples too.
    """

    benign_weight: float = 0.35  # share of the benign branches
    scale: float = 2.0  # s: factor after the power
    power: float = 2.0  # p: how much more a sure logit counts
    shift: float = 0.0  # c: added before the GELU

    def __call__(self, branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
        weights = _role_weights(branch_logits, benign, self.benign_weight)
        if all(benign):
            return _mix_probabilities(branch_logits, weights)
        standard = F.layer_norm(branch_logits, branch_logits.shape[-1:])
        clamped = F.gelu(standard + self.shift)
        sharp = self.scale * clamped.abs().clamp_min(1e-12).pow(self.power) * clamped.sign()
        mask = torch.tensor(benign, device=weights.device).view(-1, 1, 1)
        return _mix_probabilities(torch.where(mask, branch_logits, sharp), weights)

    def benign_bound(self, branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
        return _role_weights(branch_logits, benign, self.benign_weight)[_rows(benign, True)].sum(0)


@RULES.register(GATED_RULE)
@dataclass(frozen=True, kw_only=True)
class Gated(Rule):
    """Probabilities with the benign weight cap * sigmoid(sharpness * (threshold - z)), z being the gate's logit.

    The benign branches share the weight, the robust ones the rest. An image that looks clean is answered by the benign
    branches up to ``cap``, one that looks attacked by the robust ones.
    """

    needs_gate: ClassVar[bool] = True
    threshold: float = 0.0  # z at which the benign weight is half the cap
    sharpness: float = 2.0  # per unit of z
    cap: float = 1.0  # in [0, 1], largest benign weight
    robust_scale: float = 1.0  # factor on the robust logits: below 1, a robust branch overrules where it is sure

    def __call__(self, branch_logits: Tensor, benign: Sequence[bool]) -> tuple[Tensor, Tensor]:
        own = self.benign_bound(branch_logits, benign)
        logits = _scaled(branch_logits[: len(benign)], benign, self.robust_scale)
        if all(benign) or not any(benign):
            return _mix_probabilities(logits, _role_weights(logits, benign, 0.0))
        margin = self.sharpness * (self.threshold - branch_logits[len(benign), :, 0])
        cap, rest = (math.log(max(share, 1e-12)) for share in (self.cap, 1 - self.cap))
        # log w and log (1 - w) = log (1 - cap + cap * sigmoid(-margin)): exact where the sigmoid saturates
        trusted = cap + F.logsigmoid(margin)
        cautious = torch.stack([torch.full_like(own, rest), cap + F.logsigmoid(-margin)]).logsumexp(0)
        count = {kind: math.log(len(_rows(benign, kind))) for kind in (True, False)}
        logs = torch.stack([trusted - count[True] if kind else cautious - count[False] for kind in benign])
        return (logits.log_softmax(-1) + logs.unsqueeze(-1)).logsumexp(0), logs.exp()

    def benign_bound(self, branch_logits: Tensor, benign: Sequence[bool]) -> Tensor:
        if not 0 <= self.cap <= 1:
            raise ValueError(f"cap: expected a share in [0, 1], got {self.cap}")
        bound = float(all(benign)) if all(benign) or not any(benign) else self.cap
        return branch_logits.new_full(branch_logits.shape[1:2], bound)


@dataclass(frozen=True)
class Fusion:
    """Branch logits (N, B, C) to a :class:`Decision`: a rule, the roles of the branches, and a suspicion score.

    Args:
        rule: how to mix.
        benign: for each of the N branches whether it is benign.
        score: a name of :data:`zepad_mm.models.detection.SCORES`.
        gated: whether the model has a gate, whose logit is one more row: (N + 1, B, C).
    """

    rule: Rule
    benign: tuple[bool, ...]
    score: str = "jensen_shannon"
    gated: bool = False

    def __call__(self, branch_logits: Tensor) -> Decision:
        """(N, B, C), or (N + 1, B, C) with a gate, to a :class:`Decision`. Raises ValueError for other shapes."""
        branches, rows = len(self.benign), len(self.benign) + self.gated
        if branch_logits.ndim != 3 or len(branch_logits) != rows:
            hint = "; the last row is the gate's logit: write fuse(model.branch_outputs(images))" if self.gated else ""
            raise ValueError(f"branch_logits: expected ({rows}, B, C), got {tuple(branch_logits.shape)}{hint}")
        own = branch_logits[:branches]
        if branches == 1:
            logits, weights = own[0], torch.ones_like(own[..., 0])
        else:
            logits, weights = self.rule(branch_logits if self.rule.needs_gate else own, self.benign)
        score = SCORES.get(self.score)(branch_logits, self.benign)
        gate = branch_logits[branches, :, 0] if self.gated else None
        return Decision(logits, weights, own.softmax(-1).amax(-1), score, gate)

    def certified(self, branch_logits: Tensor) -> Tensor | None:
        """(B,) bool: no output of the benign branches would change the answer for this input.

        With s the largest share they can take and d the gap of the two likeliest classes among the robust branches
        alone: they can turn at most s of the probability against the first class, so (1 - s) d > s is enough (as in
        adaptive smoothing, Bai et al. 2023). It does not cover attackers who move the robust branches. None where
        the rule has no bound.
        """
        branch_logits = branch_logits[: len(self.benign)]  # the gate's logit is an output of the benign branches too
        bound = self.rule.benign_bound(branch_logits, self.benign)
        if bound is None or all(self.benign):
            return None if bound is None else torch.zeros(branch_logits.shape[1], dtype=torch.bool)
        rows = _rows(self.benign, False)
        robust, _ = self.rule(branch_logits[rows], [False] * len(rows))
        likeliest = robust.softmax(-1).topk(2, dim=-1).values
        return (1 - bound) * (likeliest[:, 0] - likeliest[:, 1]) > bound + 1e-6  # room for rounding


def build(
    name: str,
    benign: Sequence[bool],
    score: str = "jensen_shannon",
    params: dict[str, Any] | None = None,
    gate: GateConfig | None = None,
) -> Fusion:
    """A fusion by the name of its rule.

    Args:
        name: of :data:`RULES`.
        benign: for each branch whether it is benign.
        score: a name of :data:`zepad_mm.models.detection.SCORES`.
        params: constants of the rule.
        gate: of a model that has one; gives constants of the rule "gated" that ``params`` leaves out.

    Raises:
        ValueError: an unknown rule, constant or score, or one that needs a gate without a calibrated one.
    """
    SCORES.get(score)
    rule, constants = RULES.get(name), dict(params or {})
    needs = {f"the fusion rule {name!r}": rule.needs_gate, f"the score {score!r}": score == GATE_SCORE}
    for what in (what for what, needed in needs.items() if needed and gate is None):
        raise ValueError(f"{what} needs a gate, and the model has none; give it one: model.set_gate(FeatureGate(...))")
    if rule.needs_gate and gate is not None:
        constants.setdefault("sharpness", gate.sharpness)
        constants.setdefault("cap", gate.cap)
        constants.setdefault("robust_scale", gate.robust_scale)
        if "threshold" not in constants:
            constants["threshold"] = gate.calibrated_threshold
    return Fusion(rule.from_dict(constants), tuple(benign), score, gate is not None)


def rule_names(gated: bool) -> list[str]:
    """Names of the rules that a model with or without a calibrated gate has."""
    return [name for name in RULES if gated or not RULES.get(name).needs_gate]


def _mix_logits(branch_logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return (weights.unsqueeze(-1) * branch_logits).sum(0), weights


def _mix_probabilities(branch_logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the weighted mean probability, by log-sum-exp: finite for extreme logits, with gradients everywhere."""
    logs = branch_logits.log_softmax(-1) + weights.clamp_min(1e-12).log().unsqueeze(-1)
    return logs.logsumexp(0), weights


def _scaled(branch_logits: Tensor, benign: Sequence[bool], factor: float) -> Tensor:
    """Branch logits (N, B, C) with a factor on those of the robust branches."""
    return branch_logits * branch_logits.new_tensor([1.0 if kind else factor for kind in benign]).view(-1, 1, 1)


def _role_weights(branch_logits: Tensor, benign: Sequence[bool], benign_weight: float) -> Tensor:
    """(N, B) fixed weights: ``benign_weight`` over the benign branches, the rest over the robust ones."""
    if not 0 <= benign_weight <= 1:
        raise ValueError(f"benign_weight: expected a number in [0, 1], got {benign_weight}")
    if all(benign) or not any(benign):
        benign_weight = float(all(benign))
    count = {kind: len(_rows(benign, kind)) for kind in (True, False)}
    share = [benign_weight / count[True] if kind else (1 - benign_weight) / count[False] for kind in benign]
    return branch_logits.new_tensor(share).unsqueeze(1).expand(branch_logits.shape[:2])


def _rows(benign: Sequence[bool], kind: bool) -> list[int]:
    """Which branches are benign (``kind`` True) or robust."""
    return [row for row, own in enumerate(benign) if own == kind]


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(0, keepdim=True)
