"""Defences that look robust under plain PGD on cross-entropy, and that the adaptive attacks break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import broken_defences as zoo
from zepad_mm.attacks import APGD, PGD, Attack, DetectorAware, FusedAttack, Square, bpda, eot

EPSILON = 16 / 255
NAIVE = PGD(loss="ce", epsilon=EPSILON, steps=20, random_start=False)
STRONG = APGD(loss="targeted", epsilon=EPSILON, steps=20)
SQUARE = Square(epsilon=EPSILON, queries=400)

Model = Callable[[Tensor], Tensor]


def soft_gate(images: Tensor) -> Tensor:
    """The differentiable surrogate that an attacker uses for the hard threshold."""
    return torch.tanh(20 * (images - 0.5))


def gate_with(step: Model) -> Model:
    return lambda images: zoo.undefended(0.5 + 0.05 * step(images))


# name -> defence, what an attacker builds from it, the attack on that
CASES: dict[str, tuple[Model, Model, Attack]] = {
    "saturated: targeted ratio": (zoo.saturated, zoo.saturated, STRONG),
    "saturated: no gradient needed": (zoo.saturated, zoo.saturated, SQUARE),
    "hard gate: bpda": (zoo.hard_gate, gate_with(bpda(zoo.binary, soft_gate)), STRONG),
    "quantised: bpda": (zoo.quantised, lambda images: zoo.undefended(bpda(zoo.levels)(images)), STRONG),
}


def robust_accuracy(defence: Model, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((defence(images).argmax(-1) == labels).float().mean())


@pytest.mark.parametrize("name", list(CASES))
def test_strong_attack_breaks_masked_gradients(name: str) -> None:
    images, labels = zoo.make_images()
    defence, rebuilt, attack = CASES[name]
    assert robust_accuracy(defence, images, labels) > 0.9
    assert robust_accuracy(defence, NAIVE(defence, images, labels), labels) > 0.7
    assert robust_accuracy(defence, attack(rebuilt, images, labels), labels) < 0.2


def test_adaptive_losses_break_a_detached_branch() -> None:
    images, labels = zoo.make_images()
    assert robust_accuracy(zoo.detached_branch, NAIVE(zoo.detached_branch, images, labels), labels) > 0.7
    for loss in ("branch", "sum_margin"):
        attacked = FusedAttack(fuse=zoo.mean_of, loss=loss, epsilon=EPSILON, steps=20)(
            zoo.detached_parts, images, labels
        )
        assert robust_accuracy(zoo.detached_branch, attacked, labels) < 0.2, loss


def test_eot_breaks_random_resizing() -> None:
    images, labels = zoo.make_images()
    budget = 6 / 255

    def rate(attacked: Tensor) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return sum(robust_accuracy(zoo.random_resizing, attacked, labels) for _ in range(20)) / 20

    with torch.random.fork_rng():
        torch.manual_seed(1)
        plain = PGD(loss="ce", epsilon=budget, steps=20)(zoo.random_resizing, images, labels)
    attack = PGD(loss="margin", epsilon=budget, steps=20, stop_when_wrong=False)
    through = attack(eot(zoo.random_resizing, passes=20), images, labels)
    rates = {"clean": rate(images), "plain": rate(plain), "through": rate(through)}
    assert rates["clean"] > 0.7, rates
    assert rates["plain"] > 0.6, rates
    assert rates["through"] < 0.3, rates


def test_detector_that_leaks_labels_depends_on_them() -> None:
    """No input evades it, also when its labels are not the true ones, which shows that it reads them."""
    images, labels = zoo.make_images()
    wrong = NAIVE(zoo.undefended, images, labels)
    leaking = zoo.leaking_detector(labels)
    assert (leaking(zoo.undefended(wrong)[None]) > 0.5).all()  # it seems perfect
    other = (labels + 1) % zoo.CLASSES
    towards = PGD(loss="margin", epsilon=EPSILON, steps=20)(zoo.undefended, wrong, labels)
    answers = zoo.undefended(towards).argmax(-1)
    assert (answers != labels).all()
    honest = zoo.leaking_detector(answers)  # deployed, the labels are unknown: the answer takes their place
    assert not (honest(zoo.undefended(towards)[None]) > 0.5).any()
    assert robust_accuracy(zoo.undefended, images, other) == 0


def test_detector_aware_attack_evades_a_disagreement_score() -> None:
    images, labels = zoo.make_images()
    threshold = float(zoo.disagreement(zoo.detached_parts(images)).max())

    def evading(attacked: Tensor) -> float:
        logits = zoo.detached_parts(attacked)
        wrong = zoo.mean_of(logits).logits.argmax(-1) != labels
        return float((wrong & (zoo.disagreement(logits) <= threshold)).float().mean())

    big = 0.2
    plain = PGD(loss="ce", epsilon=big, steps=20, stop_when_wrong=False)(zoo.detached_branch, images, labels)
    aware = DetectorAware(
        fuse=zoo.mean_of, score=zoo.disagreement, threshold=threshold, mode="weakest", epsilon=big, steps=60
    )(zoo.detached_parts, images, labels)
    assert evading(plain) < 0.3
    assert evading(aware) > 0.8
