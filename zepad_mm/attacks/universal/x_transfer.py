"""X-Transfer (Huang et al., ICML 2025): one delta for a pool of surrogate encoders, a few of them per step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, FeatureAttack, SignAscentAttack, Surrogate


class UpperConfidence:
    """UCB1 bandit over surrogates: mean reward plus a bonus for those seldom chosen.

    Args:
        arms: number of surrogates.
        exploration: factor in the root, rho of the paper.
        smoothing: weight of the newest reward in an arm's moving average.

    Attributes:
        visits: how often each arm was chosen.
    """

    def __init__(self, arms: int, exploration: float, smoothing: float) -> None:
        self.visits = [0] * arms
        self._reward = [0.0] * arms
        self._exploration = exploration
        self._smoothing = smoothing

    def choose(self, k: int) -> list[int]:
        """The ``k`` best arms, untried ones first, in ascending order."""
        tried = max(1, sum(self.visits))
        scores = [
            reward + math.sqrt(self._exploration * math.log(tried) / visits) if visits else math.inf
            for reward, visits in zip(self._reward, self.visits, strict=True)
        ]
        return sorted(sorted(range(len(scores)), key=lambda arm: -scores[arm])[:k])

    def reward(self, arm: int, value: float) -> None:
        """Record the reward ``value`` of an arm."""
        weight = self._smoothing if self.visits[arm] else 1.0
        self._reward[arm] += weight * (value - self._reward[arm])
        self.visits[arm] += 1


@UNIVERSAL_ATTACKS.register("x_transfer")
@dataclass(frozen=True, kw_only=True)
class XTransfer(SignAscentAttack, FeatureAttack):
    """Feature attack on ``k`` surrogates per step, preferring those that the delta fools least so far.

    The reward of a surrogate is one minus its feature loss, which for the cosine loss is the remaining similarity.
    ``encoder`` of :meth:`fit` is the pool; with a single encoder this is the paper's one-surrogate baseline.
    """

    k: int = 1  # surrogates per step
    exploration: float = 2.0  # rho
    smoothing: float = 0.01  # of the moving average of rewards

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or not self.exploration >= 0 or not 0 < self.smoothing <= 1:
            raise ValueError(
                "expected k >= 1, exploration >= 0 and smoothing in (0, 1], "
                f"got {self.k}, {self.exploration} and {self.smoothing}"
            )

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        bandit = UpperConfidence(len(surrogate.encoders), self.exploration, self.smoothing)

        def objective(delta: Tensor, batch: Tensor) -> Tensor:
            losses = []
            for arm in bandit.choose(self.k):
                losses.append(surrogate.loss(delta, batch, self.criterion, [arm]))
                bandit.reward(arm, 1 - surrogate.last_loss)
            return surrogate.record_loss(torch.stack(losses).mean())

        return self.ascend(surrogate, generator, objective)
