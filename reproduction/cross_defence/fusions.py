"""Fusions of the public and the robust encoder: ZePAD's rule, MixedNUTS, adaptive smoothing, and this project's.

- ZePAD (the paper behind this project): RFDM, confidence weights on logits. Its authors attack with universal
  perturbations made on the public encoder.
- MixedNUTS (Bai et al. 2024): sharpened robust probabilities mixed with the accurate model's, constants of
  ``zepad_mm.models.fusion``.
- This project's gate, as the model ships and with smaller caps on the benign weight: the dial between both encoders.
- Adaptive smoothing (Bai et al. 2023): probabilities mixed with a weight that a network learns with labels for one set
  of classes. Zero-shot there are no such labels, so the weight is constant here, a quarter for the public encoder.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from reproduction.cross_defence.base import DEFENCES, AuthorsAttack, Defence, FurtherAttack, Parts, Path
from zepad_mm.attacks import FusedAttack
from zepad_mm.models.fusion import Fusion
from zepad_mm.models.fusion import build as build_fusion
from zepad_mm.models.zepad import ZePAD

ADAPTIVE_SMOOTHING_WEIGHT = 0.25  # of the public encoder


class Fused(Defence):
    """The branches of a defended model under a fusion rule.

    The attackers go through the rule, and weigh the branches by their influence (MORA). Examples made on the robust
    encoder, and on both encoders at once, are tried on every defence.

    Args:
        model: the defended model.
        fusion: the rule; None: as the model ships.
        attack: what its authors attacked it with.
    """

    def __init__(self, model: ZePAD, fusion: Fusion | None = None, attack: AuthorsAttack = "apgd_defence") -> None:
        super().__init__()
        self.model, self.fusion = model, fusion
        self.attack = attack

    @property
    def rule(self) -> Fusion:
        """The rule that answers."""
        return self.fusion or self.model.fusion

    def forward(self, images: Tensor) -> Tensor:
        return self.rule(self.branch_logits(images)).logits

    def branch_logits(self, images: Tensor) -> Tensor:
        """(N, B, C), and the row of the gate where the rule reads it."""
        logits = self.model.branch_logits(images)
        return logits if self.rule.gated else logits[: len(self.model.benign)]

    def paths(self) -> list[Path]:
        return [Path("through", self, views=len(self.model.benign))]

    def further_attacks(self, epsilon: float, steps: int) -> list[FurtherAttack]:
        attack = FusedAttack(fuse=self.rule, loss="mora", epsilon=epsilon, steps=steps)
        return [FurtherAttack("mora", attack, self.branch_logits, len(self.model.benign))]


@DEFENCES.register("zepad_rule")
def build_rfdm(parts: Parts) -> Defence:
    """ZePAD's rule: logits of both encoders weighted by their confidence, k = 3."""
    return Fused(parts.defended, build_fusion("rfdm", parts.defended.benign), "universal")


@DEFENCES.register("mixed_nuts")
def build_mixed_nuts(parts: Parts) -> Defence:
    """MixedNUTS: sharpened robust probabilities mixed with those of the public CLIP."""
    return Fused(parts.defended, build_fusion("mixed_nuts", parts.defended.benign))


@DEFENCES.register("adaptive_smoothing")
def build_adaptive_smoothing(parts: Parts) -> Defence:
    """Adaptive smoothing with a constant weight: probabilities mixed, a quarter from the public CLIP."""
    constants = {"benign_weight": ADAPTIVE_SMOOTHING_WEIGHT, "sharpness": 1.0}
    return Fused(parts.defended, build_fusion("bounded_benign", parts.defended.benign, params=constants))


@DEFENCES.register("ours")
def build_ours(parts: Parts) -> Defence:
    """The defended model as it ships: the gate weighs the probabilities of both encoders."""
    return Fused(parts.defended)


def with_cap(model: ZePAD, cap: float) -> Defence:
    """A gated model whose benign weight is at most ``cap``."""
    own = model.fusion.rule
    rule = type(own).from_dict({**own.to_dict(), "cap": cap})
    return Fused(model, replace(model.fusion, rule=rule))
