"""Attacks on fused models and detectors; starts, 8-bit images, curves, files, EOT and BPDA of all attacks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.broken_defences import Answer, make_images, mean_of, undefended
from zepad_mm.attacks import (
    ADAPTIVE_ATTACKS,
    APGD,
    ATTACKS,
    FUSED_LOSSES,
    MODES,
    PGD,
    Attack,
    DetectorAware,
    FusedAttack,
    SuperclassAttack,
    bpda,
    curve,
    eot,
    load_adversarial,
    save_adversarial,
)
from zepad_mm.attacks.adaptive import MORA_BETAS, mora_weights
from zepad_mm.models.fusion import build

EPSILON = {"linf": 4 / 255, "l2": 0.4}
LEVEL = 1 / 255
THRESHOLD = 0.02
GROUPS = (0, 0, 1, 1)  # superclasses
FUSION = build("rfdm", (False, False, True))
MIX = torch.eye(768) + 0.02 * torch.randn(3, 768, 768, generator=torch.Generator().manual_seed(3))


def branches(images: Tensor) -> Tensor:
    """Three different linear branches: (3, B, 4)."""
    turned = [((images.flatten(1) - 0.5) @ mix + 0.5).view_as(images) for mix in MIX]
    return torch.stack([undefended(one) for one in turned])


def score(logits: Tensor) -> Tensor:
    return FUSION(logits).score


def suite(norm: str) -> list[Attack]:
    basics: dict[str, Any] = {"epsilon": EPSILON[norm], "norm": norm, "steps": 8, "fuse": FUSION}
    fused: list[Attack] = [FusedAttack(loss=loss, **basics) for loss in FUSED_LOSSES]
    fused.append(SuperclassAttack(groups=GROUPS, **basics))
    return fused + [DetectorAware(mode=mode, score=score, threshold=THRESHOLD, spread=0.01, **basics) for mode in MODES]


ALL = [attack for norm in EPSILON for attack in suite(norm)]
every = pytest.mark.parametrize("attack", ALL, ids=repr)


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    return make_images(12)


def inside(adversarial: Tensor, images: Tensor, attack: Attack) -> bool:
    delta = (adversarial - images).flatten(1)
    length = delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)
    return bool(
        ((length <= attack.epsilon + 1e-6) & (adversarial.flatten(1).amin(1) >= 0)).all() and adversarial.max() <= 1
    )


@every
def test_adaptive_attacks_honour_the_attack_contract(attack: Attack, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    state = torch.get_rng_state()
    first, again = (attack(branches, images, labels, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert inside(first, images, attack)
    assert attack(branches, images[:0], labels[:0]).shape == (0, 3, 16, 16)
    assert inside(attack(branches, images[:1], labels[:1]), images[:1], attack)

    def broken(pixels: Tensor) -> Tensor:
        return branches(pixels) + torch.where(pixels[:, 0, 0, 0] > 0.5, torch.nan, 0.0)[:, None]

    assert torch.isfinite(attack(broken, images, labels)).all()


@pytest.mark.parametrize("norm", list(EPSILON))
@pytest.mark.parametrize("loss", list(FUSED_LOSSES))
def test_fused_losses_change_the_fused_prediction(loss: str, norm: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    assert (FUSION(branches(images)).logits.argmax(-1) == labels).all()
    big = 0.2 if norm == "linf" else 6.0
    attack = FusedAttack(fuse=FUSION, loss=loss, epsilon=big, norm=norm, steps=20)
    adversarial = attack(branches, images, labels)
    wrong = FUSION(branches(adversarial)).logits.argmax(-1) != labels
    assert torch.equal(~attack.still_correct(branches, adversarial, labels), wrong)
    assert wrong.float().mean() >= 0.9


def test_superclass_attack_leaves_the_superclass(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    attack = SuperclassAttack(fuse=FUSION, groups=GROUPS, epsilon=0.2, steps=20)
    answers = FUSION(branches(attack(branches, images, labels))).logits.argmax(-1)
    groups = torch.tensor(GROUPS)
    assert (groups[answers] != groups[labels]).float().mean() >= 0.9
    with pytest.raises(ValueError, match="superclass of each of 4 classes"):
        replace(attack, groups=(0, 1))(branches, images, labels)


def test_mora_runs_five_shares_of_the_branches_and_weighs_by_influence() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(3, 6, 5, generator=generator)).double().requires_grad_()
    labels = torch.arange(6) % 5
    losses = FUSED_LOSSES.get("mora")(mean_probability, 3)
    assert len(losses) == len(MORA_BETAS) == 5
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), logits)
        assert torch.isfinite(gradient).all()
    # the weights are those of the derivative of the fused log-ratio, by autograd
    fused = mean_probability(logits).logits
    rival = fused.scatter(-1, labels[:, None], -torch.inf).argmax(-1, keepdim=True)
    (slope,) = torch.autograd.grad(
        (fused.gather(-1, rival).squeeze(-1) - fused.gather(-1, labels[:, None])[:, 0]).sum(), logits
    )
    expected = slope.gather(-1, rival.expand(3, -1, 1)).squeeze(-1)
    torch.testing.assert_close(mora_weights(mean_probability(logits), logits, labels), expected)


def mean_probability(logits: Tensor) -> Answer:
    mean = logits.softmax(-1).mean(0)
    return Answer(mean.log(), torch.full_like(logits[..., 0], 1 / len(logits)))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "suppress"])
def test_detector_aware_evades_the_detector(mode: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    attack = DetectorAware(mode=mode, fuse=FUSION, score=score, threshold=THRESHOLD, spread=0.01, epsilon=0.2, steps=60)
    decision = FUSION(branches(attack(branches, images, labels)))
    won = (decision.logits.argmax(-1) != labels) & (decision.score <= THRESHOLD)
    assert won.float().mean() >= 0.8


def test_suppress_lowers_the_score_of_misclassified_images(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    wrong = FusedAttack(fuse=FUSION, loss="branch", epsilon=0.2, steps=10)(branches, images, labels)
    before = score(branches(wrong))
    threshold = float(before.median())
    attack = DetectorAware(
        mode="suppress", fuse=FUSION, score=score, threshold=threshold, spread=0.01, epsilon=0.2, steps=30
    )
    after = attack(branches, images, labels, start=wrong)
    held = attack.still_correct(branches, wrong, labels)
    assert attack.still_correct(branches, after, labels).sum() <= held.sum()


def test_adaptive_attacks_are_at_least_as_strong_as_generic_ones(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = make_images(48, seed=5)
    budget = 3 / 255

    def fused(pixels: Tensor) -> Tensor:
        return FUSION(branches(pixels)).logits

    generic = APGD(loss="targeted", epsilon=budget, steps=20)
    left = generic.still_correct(fused, generic(fused, images, labels), labels)
    remaining = torch.ones_like(left)
    for loss in FUSED_LOSSES:
        attack = FusedAttack(fuse=FUSION, loss=loss, epsilon=budget, steps=20)
        remaining &= attack.still_correct(branches, attack(branches, images, labels), labels)
    assert 0 < left.sum() < len(labels)  # neither attack is trivial
    assert remaining.sum() <= left.sum()


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("norm", list(EPSILON))
def test_quantize_gives_8_bit_images(name: str, norm: str, batch: tuple[Tensor, Tensor]) -> None:
    if norm not in ATTACKS.get(name).norms:
        pytest.skip(f"{name} does not support {norm}")
    images, labels = batch
    images = (images * 255).round() / 255
    attack = ATTACKS.get(name)(epsilon=4 * EPSILON[norm], norm=norm, quantize=True)
    adversarial = attack(undefended, images, labels)
    assert torch.equal((adversarial * 255).round() / 255, adversarial)
    assert inside(adversarial, images, attack)
    if name != "rays":  # flips blocks, and these patterns are random signs of single pixels
        assert (undefended(adversarial).argmax(-1) != labels).float().mean() > 0.5
    if norm == "linf":
        assert torch.equal(replace(attack, epsilon=0.5 * LEVEL)(undefended, images, labels), images)
    with pytest.raises(ValueError, match=r"\(images \* 255\).round\(\) / 255"):
        attack(undefended, images + 0.3 * LEVEL, labels)


def test_saved_images_are_predicted_the_same(tmp_path: Any, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = (batch[0] * 255).round() / 255, batch[1]
    adversarial = PGD(quantize=True)(undefended, images, labels)
    save_adversarial(tmp_path / "pgd", adversarial, labels, {"attack": "pgd"})
    loaded = load_adversarial(tmp_path / "pgd")
    assert torch.equal(loaded.images, adversarial)
    assert torch.equal(undefended(loaded.images), undefended(adversarial))
    assert loaded.labels is not None
    assert torch.equal(loaded.labels, labels)
    assert loaded.about == {"attack": "pgd"}
    with pytest.raises(FileExistsError, match="another folder"):
        save_adversarial(tmp_path / "pgd", adversarial)
    with pytest.raises(ValueError, match="multiples of 1 / 255"):
        save_adversarial(tmp_path / "other", PGD()(undefended, images, labels))
    (tmp_path / "pgd" / "000001.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000001\.png"):
        load_adversarial(tmp_path / "pgd")
    with pytest.raises(FileNotFoundError, match="save_adversarial"):
        load_adversarial(tmp_path)


@pytest.mark.parametrize("name", list(ATTACKS))
def test_start_is_used_and_clipped_to_the_budget(name: str, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    seen: list[Tensor] = []

    def model(pixels: Tensor) -> Tensor:
        seen.append(pixels.detach().clone())
        return undefended(pixels)

    attack = ATTACKS.get(name)(epsilon=1 / 255)
    adversarial = attack(model, images, labels, start=torch.ones_like(images))
    torch.testing.assert_close(seen[1], (images + 1 / 255).clamp(0, 1))  # after the clean images
    assert inside(adversarial, images, attack)
    with pytest.raises(ValueError, match="start: expected one start for each image"):
        attack(undefended, images, labels, start=images[:3])


@pytest.mark.parametrize("attack", [PGD(steps=5), APGD(steps=5)], ids=repr)
def test_curve_never_increases(attack: Attack, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    found = curve(attack, undefended, images, labels, [8 * LEVEL, 0.0, 2 * LEVEL, 4 * LEVEL])
    assert found.epsilons == (0.0, 2 * LEVEL, 4 * LEVEL, 8 * LEVEL)
    assert found.accuracy[0] == 1
    assert found.accuracy[-1] == 0
    assert bool((found.still_correct[1:] <= found.still_correct[:-1]).all())
    with pytest.raises(ValueError, match="budgets"):
        curve(attack, undefended, images, labels, [])
    fused = curve(FusedAttack(fuse=FUSION, steps=5), branches, images, labels, [0.0, 0.2])
    assert fused.accuracy == (1.0, 0.0)


def test_eot_averages_and_restores_the_global_state(batch: tuple[Tensor, Tensor]) -> None:
    images, _ = batch

    def noisy(pixels: Tensor) -> Tensor:
        return undefended(pixels) + torch.randn(len(pixels), 4)

    state = torch.get_rng_state()
    averaged = eot(noisy, passes=400)
    first = averaged(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, averaged(images))
    assert not torch.equal(first, eot(noisy, passes=400, seed=1)(images))
    assert (first - undefended(images)).abs().max() < 6 / math.sqrt(400)
    with pytest.raises(ValueError, match="passes"):
        eot(noisy, passes=0)


def test_bpda_is_exact_forward_and_smooth_backward() -> None:
    inputs = torch.rand(5, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    outputs = bpda(torch.round)(inputs)
    assert torch.equal(outputs, inputs.round())
    assert torch.equal(torch.autograd.grad(outputs.sum(), inputs)[0], torch.ones(5))
    (slope,) = torch.autograd.grad(bpda(torch.round, torch.sin)(inputs).sum(), inputs)
    torch.testing.assert_close(slope, inputs.cos())
    with pytest.raises(ValueError, match="same output shape"):
        bpda(torch.round, lambda x: x[:2])(inputs)


@pytest.mark.parametrize(
    ("build_it", "says"),
    [
        (lambda: FusedAttack(fuse=FUSION, loss="hijack"), "unknown loss on a fused model"),
        (lambda: FusedAttack(fuse=3), "model.fuse"),  # type: ignore[arg-type]
        (lambda: FusedAttack(fuse=FUSION, driver="sgd"), "'apgd', 'pgd', 'momentum'"),
        (lambda: FusedAttack(fuse=FUSION, steps=0), "steps"),
        (lambda: DetectorAware(fuse=FUSION, score=score, threshold=0.1, mode="sly"), "unknown detector-aware mode"),
        (lambda: DetectorAware(fuse=FUSION, score=score, threshold=0.1, spread=0.0), "positive spread"),
        (lambda: DetectorAware(fuse=FUSION, score=None, threshold=0.1), "score"),  # type: ignore[arg-type]
        (lambda: ADAPTIVE_ATTACKS.get("fusd"), "did you mean 'fused'"),
    ],
)
def test_bad_settings_raise(build_it: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build_it()


def test_bad_calls_raise(batch: tuple[Tensor, Tensor]) -> None:
    attack = FusedAttack(fuse=lambda logits: Answer(*vars(mean_of(logits)).values()))
    with pytest.raises(ValueError, match=r"model\.branch_logits, not the fused model"):
        attack(undefended, *batch)
    with pytest.raises(ValueError, match="true labels"):
        attack(branches, batch[0])
    with pytest.raises(ValueError, match="classes below 4"):
        attack(branches, batch[0], batch[1] + 4)
