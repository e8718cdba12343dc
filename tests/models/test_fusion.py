"""The contract of fusion rules and suspicion scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from zepad_mm.models import detection
from zepad_mm.models.fusion import RULES, Decision, Fusion, Rule, build, rfdm_weights
from zepad_mm.models.gate import GateConfig, with_gate

BENIGN = (False, False, True)
GATE = GateConfig(threshold=0.0, cap=0.4)


def logits(scale: float = 3.0, seed: int = 0, branches: int = 3, n: int = 5, classes: int = 4) -> torch.Tensor:
    return scale * torch.randn(branches, n, classes, generator=torch.Generator().manual_seed(seed))


def fusion_of(rule: str, benign: Sequence[bool] = BENIGN) -> Fusion:
    """A fusion by any rule, of a model with a gate where the rule needs one."""
    return build(rule, benign, gate=GATE if RULES.get(rule).needs_gate else None)


def fuse(fusion: Fusion, z: torch.Tensor) -> Decision:
    """Branch logits (N, B, C) to a Decision; a gate says something else of each image."""
    return fusion(with_gate(z, torch.linspace(-2, 2, z.shape[1]) if fusion.gated else None))


@pytest.mark.parametrize("rule", RULES)
def test_fusion_weights_sum_to_one_in_any_order(rule: str) -> None:
    z = logits()
    decision = fuse(fusion_of(rule), z)
    torch.testing.assert_close(decision.weights.sum(0), torch.ones(5))
    assert (decision.weights >= 0).all()
    order = torch.tensor([2, 0, 1])
    moved = fuse(fusion_of(rule, [BENIGN[i] for i in order]), z[order])
    torch.testing.assert_close(moved.logits, decision.logits)
    torch.testing.assert_close(moved.weights, decision.weights[order])
    torch.testing.assert_close(moved.score, decision.score)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("benign", [(True,), (False,)])
def test_fusion_of_one_branch_returns_its_logits(rule: str, benign: tuple[bool, ...]) -> None:
    z = logits(branches=1)
    torch.testing.assert_close(fuse(fusion_of(rule, benign), z).logits, z[0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("benign", [(True, True), (False, False)])
def test_fusion_of_branches_of_one_role(rule: str, benign: tuple[bool, ...]) -> None:
    decision = fuse(fusion_of(rule, benign), logits(branches=2))
    torch.testing.assert_close(decision.weights.sum(0), torch.ones(5))
    assert torch.isfinite(decision.logits).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
def test_fusion_is_finite_for_extreme_logits(rule: str, scale: float) -> None:
    z = logits(scale).requires_grad_(True)
    decision = fuse(fusion_of(rule), z)
    assert torch.isfinite(decision.logits).all()
    (gradient,) = torch.autograd.grad(decision.logits.sum(), z)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("rule", RULES)
def test_fusion_gradient_reaches_every_branch(rule: str) -> None:
    z = logits(1.0).requires_grad_(True)
    fused = fuse(fusion_of(rule), z).logits
    (gradient,) = torch.autograd.grad((fused[:, 0] - fused[:, 1]).sum(), z)
    assert (gradient.abs().sum((1, 2)) > 1e-4).all()


def test_rfdm_matches_the_papers_formula() -> None:
    """c = m exp(3 (m - 1/2)); the method text computes 0.5 -> 0.5, 0.95 -> 3.67, 1 -> 4.48."""
    for confidence, expected in ((0.5, 0.5), (0.6, 0.81), (0.95, 3.67), (0.999999, 4.48)):
        assert confidence * math.exp(3 * (confidence - 0.5)) == pytest.approx(expected, abs=6e-3)
    odds = torch.tensor([0.99, 0.6, 0.6])
    z = torch.stack([odds.log(), (1 - odds).log()], -1).unsqueeze(1)
    weights = rfdm_weights(z, 3.0)[:, 0]
    torch.testing.assert_close(weights, torch.tensor([0.73, 0.135, 0.135]), atol=1e-2, rtol=0)
    fused = build("rfdm", BENIGN)(z).logits[0]
    torch.testing.assert_close(fused, (weights.unsqueeze(1) * z[:, 0]).sum(0))


def test_bounded_benign_keeps_confident_robust_answers() -> None:
    z = torch.zeros(3, 1, 4)
    z[:2, 0, 1] = 6.0  # both robust branches: class 1
    for other in (10.0, 1e3, 1e6):
        z[2] = 0.0
        z[2, 0, 3] = other  # the benign branch outputs class 3 with large logits
        assert build("bounded_benign", BENIGN, params={"benign_weight": 0.3})(z).logits.argmax(-1).item() == 1
        assert build("equal", BENIGN)(z).logits.argmax(-1).item() == (1 if other < 12 else 3)


@pytest.mark.parametrize("cap", [0.0, 0.4, 1.0])
def test_gated_mixes_probabilities_by_the_gate(cap: float) -> None:
    z, said = logits(), torch.tensor([-60.0, -1.0, 0.0, 1.0, 60.0])
    fusion = build("gated", BENIGN, "feature_gate", gate=GateConfig(threshold=0.5, sharpness=3.0, cap=cap))
    decision = fusion(with_gate(z, said))
    weight = cap * torch.sigmoid(3 * (0.5 - said))
    torch.testing.assert_close(decision.weights[2], weight, atol=1e-6, rtol=1e-4)
    robust, benign = z[:2].softmax(-1).mean(0), z[2].softmax(-1)
    expected = weight[:, None] * benign + (1 - weight[:, None]) * robust
    torch.testing.assert_close(decision.logits.exp(), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(decision.score, said)
    assert decision.gate is not None
    torch.testing.assert_close(decision.gate, said)


def test_gated_gradient_does_not_vanish_where_the_weight_saturates() -> None:
    """In log space, so that attacks on confident branches see the gate far from its threshold."""
    z = torch.zeros(2, 1, 3)
    z[0, 0, 0], z[1, 0, 1] = 200.0, 200.0
    said = torch.tensor([20.0], requires_grad=True)
    fused = build("gated", (False, True), gate=GateConfig(threshold=0.0))(with_gate(z, said)).logits
    (gradient,) = torch.autograd.grad(fused[:, 1].sum(), said)
    assert gradient.item() == pytest.approx(-2.0, rel=1e-3)


def test_capped_rfdm_limits_the_benign_weight() -> None:
    z = torch.zeros(3, 1, 4)
    z[2, 0, 0] = 50.0
    weights = build("capped_rfdm", BENIGN, params={"cap": 0.25})(z).weights
    assert weights[2, 0] <= 0.25 + 1e-6


@pytest.mark.parametrize("score", detection.score_names(gated=False))
def test_detection_score_rises_with_disagreement(score: str) -> None:
    agree, differ = torch.zeros(3, 1, 4), torch.zeros(3, 1, 4)
    agree[..., 0] = 4.0
    differ[:2, ..., 0] = 4.0
    differ[2, ..., 1] = 2.0
    function = detection.SCORES.get(score)
    assert function(differ, BENIGN).item() > function(agree, BENIGN).item() + 1e-3
    assert function(agree, BENIGN).item() == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(function(differ * 1e4, BENIGN)).all()


def test_threshold_at_keeps_the_false_positive_rate() -> None:
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for rate in (0.0, 0.01, 0.05):
        assert (scores > detection.threshold_at(scores, rate)).float().mean() <= rate
    with pytest.raises(ValueError, match="got none"):
        detection.threshold_at(torch.empty(0), 0.05)


def test_fusion_errors_name_the_fix() -> None:
    with pytest.raises(ValueError, match="did you mean 'rfdm'"):
        build("rfdmm", BENIGN)
    with pytest.raises(ValueError, match="no key 'benign_wieght'; did you mean 'benign_weight'"):
        build("bounded_benign", BENIGN, params={"benign_wieght": 0.1})
    with pytest.raises(ValueError, match=r"expected \(3, B, C\)"):
        build("rfdm", BENIGN)(logits(branches=2))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        build("bounded_benign", BENIGN, params={"benign_weight": 2.0})(logits())
    for name, score in (("gated", "jensen_shannon"), ("equal", "feature_gate")):
        with pytest.raises(ValueError, match=r"needs a gate, and the model has none; .*set_gate"):
            build(name, BENIGN, score)
    with pytest.raises(ValueError, match=r"expected \(4, B, C\), got \(3, 5, 4\); the last row is the gate's"):
        build("gated", BENIGN, gate=GATE)(logits())


@pytest.mark.parametrize("rule", RULES)
def test_certified_answers_resist_every_benign_output(rule: str) -> None:
    """The benign branch may output any class with any confidence and any size of logits."""
    z = logits(4.0, n=400)
    fusion = fusion_of(rule)
    certified = fusion.certified(z)
    if certified is None:
        assert RULES.get(rule).benign_bound is Rule.benign_bound  # the rule declares no bound
        return
    before = fuse(fusion, z).logits.argmax(-1)
    changed = torch.zeros(400, dtype=torch.bool)
    for target in range(4):
        for size in (0.0, 0.5, 2.0, 8.0, 1e3):
            free = z.clone()
            free[2] = size * torch.nn.functional.one_hot(torch.tensor(target), 4)
            for free_gate in (-50.0, 50.0) if fusion.gated else (None,):  # which the benign branch moves too
                said = None if free_gate is None else torch.full((400,), free_gate)
                changed |= fusion(with_gate(free, said)).logits.argmax(-1) != before
    assert 0 < int(certified.sum()) < 400
    assert not bool((changed & certified).any())
    if rule == "bounded_benign":  # the certificate is tight: uncertified answers can be changed
        robust = build(rule, BENIGN[:2])(z[:2]).logits.argmax(-1)
        assert bool((changed | certified | (robust != before)).all())


def test_certified_needs_a_robust_branch() -> None:
    certified = build("bounded_benign", (True, True)).certified(logits(branches=2))
    assert certified is not None
    assert not certified.any()
