"""Every registered universal attack: no labels, inside the budget, each image encoded once, stronger than noise."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.attacks import FEATURE_LOSSES, UNIVERSAL_ATTACKS, AdvEncoder, FeatureUAP, Perturbation, UniversalAttack
from zepad_mm.attacks.universal.adv_encoder import high_pass
from zepad_mm.attacks.universal.base import FeatureAttack
from zepad_mm.attacks.universal.perturbation_generator import PerturbationGenerator
from zepad_mm.attacks.universal.surrogate_heads import PseudoLabelAttack

SIDE = 16
EPSILON = {"linf": 32 / 255, "l2": 3.0, "patch": 0.1}
NETWORK: dict[str, Any] = {"maps": 3, "width": 16, "learning_rate": 5e-3}
QUICK: dict[str, dict[str, Any]] = {
    "adv_encoder": NETWORK,
    "adv_encoder_patch": NETWORK,
    "adv_clip": {**NETWORK, "clusters": 4},
    "uap": {"steps": 8, "clusters": 4},
    "uapgd": {"clusters": 4},
}
CASES = [
    UNIVERSAL_ATTACKS.get(name)(
        epsilon=EPSILON[norm], norm=norm, image_size=SIDE, batch_size=16, **{"steps": 24, **QUICK.get(name, {})}
    )
    for name in UNIVERSAL_ATTACKS
    for norm in UNIVERSAL_ATTACKS.get(name).norms
]
every_attack = pytest.mark.parametrize("attack", CASES, ids=repr)
of_features = pytest.mark.parametrize("attack", [case for case in CASES if isinstance(case, FeatureAttack)], ids=repr)
# attacks that call the encoder once per step and use its output alone, so that the calls can be counted
plain = pytest.mark.parametrize(
    "attack",
    [case for case in CASES if isinstance(case, FeatureAttack | PseudoLabelAttack) and case.steps == 24],
    ids=repr,
)


def make_encoder(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        ).eval()


@pytest.fixture
def encoder() -> nn.Sequential:
    return make_encoder(0)


@pytest.fixture
def surrogate() -> Tensor:
    """40 smooth random images; batches of 16 leave an incomplete one."""
    coarse = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=False)


def length(delta: Tensor, norm: str) -> float:
    if norm == "patch":  # share of the pixels that changed
        return float((delta != 0).any(0).double().mean())
    return float(delta.double().abs().max() if norm == "linf" else delta.double().norm())


def distance(encoder: nn.Module, perturbation: Perturbation, images: Tensor) -> float:
    """Mean cosine distance between clean and adversarial features."""
    with torch.no_grad():
        return float((1 - F.cosine_similarity(encoder(images), encoder(perturbation(images)))).mean())


def check_strength(attack: UniversalAttack, encoder: nn.Module, surrogate: Tensor) -> None:
    """Check the budget, and that features move further than under random noise of the same budget."""
    made = attack.fit(encoder, surrogate)
    assert made.delta.shape == ((3, 5, 5) if attack.norm == "patch" else (3, SIDE, SIDE))
    assert (made.epsilon, made.norm) == (attack.epsilon, attack.norm)
    assert length((made(surrogate) - surrogate)[0], attack.norm) <= attack.epsilon + 1e-6
    generator = torch.Generator().manual_seed(0)
    if attack.norm == "patch":
        controls = [Perturbation(torch.rand(3, 5, 5, generator=generator), attack.epsilon, "patch") for _ in range(5)]
    else:
        noises = [1e3 * torch.randn(3, SIDE, SIDE, generator=generator).sign() for _ in range(5)]
        controls = [Perturbation.fit_budget(noise, attack.epsilon, attack.norm) for noise in noises]
    reach = sum(distance(encoder, control, surrogate) for control in controls) / len(controls)
    assert distance(encoder, made, surrogate) > reach


@every_attack
def test_fit_stays_in_budget_and_beats_noise(attack, encoder, surrogate):
    check_strength(attack, encoder, surrogate)


@of_features
@pytest.mark.parametrize("loss", list(FEATURE_LOSSES))
def test_every_loss_beats_noise(attack, loss, encoder, surrogate):
    check_strength(replace(attack, loss=loss), encoder, surrogate)


@every_attack
def test_larger_budget_is_stronger(attack, encoder, surrogate):
    reach = [
        distance(encoder, replace(attack, epsilon=part * attack.epsilon).fit(encoder, surrogate), surrogate)
        for part in (0.0, 0.25, 1.0)
    ]
    assert reach == sorted(reach)
    assert reach[0] < 1e-6 < reach[1] < reach[2]


@every_attack
def test_seed_determines_the_result_and_the_global_rng_is_unused(attack, encoder, surrogate):
    rng = torch.get_rng_state()
    first, again = (attack.fit(encoder, surrogate).delta for _ in range(2))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(first, again)
    assert not torch.equal(first, replace(attack, seed=1).fit(encoder, surrogate).delta)
    by_hand = attack.fit(encoder, surrogate, generator=torch.Generator().manual_seed(attack.seed)).delta
    assert torch.equal(first, by_hand)
    other = attack.fit(encoder, surrogate, generator=torch.Generator().manual_seed(77))
    assert other.provenance["seed"] == 77


@every_attack
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_encoder_is_restored(attack, training, encoder, surrogate):
    encoder.train(training)
    encoder[0].weight.requires_grad_(False)
    modes = [module.training for module in encoder.modules()]
    requires_grad = [parameter.requires_grad for parameter in encoder.parameters()]
    state = copy.deepcopy(encoder.state_dict())
    before = surrogate.clone()
    attack.fit(encoder, surrogate)
    assert torch.equal(surrogate, before)
    assert [module.training for module in encoder.modules()] == modes
    assert [parameter.requires_grad for parameter in encoder.parameters()] == requires_grad
    assert all(parameter.grad is None for parameter in encoder.parameters())
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@plain
def test_each_clean_image_is_encoded_once(attack, encoder, surrogate):
    clean: list[Tensor] = []
    batches: list[int] = []

    def counted(images: Tensor) -> Tensor:
        (batches.append(len(images)) if images.requires_grad else clean.append(images))
        return encoder(images)

    attack.fit({"a": counted}, surrogate)
    seen = torch.cat(clean).flatten(1)
    assert len(seen) == len(surrogate)
    assert len(seen.unique(dim=0)) == len(surrogate)
    assert batches == [16] * attack.steps


@every_attack
def test_several_encoders(attack, encoder, surrogate):
    other = make_encoder(5)
    alone = attack.fit(encoder, surrogate)
    both = attack.fit([encoder, other], surrogate)
    assert not torch.equal(alone.delta, both.delta)
    assert distance(other, both, surrogate) > distance(other, alone, surrogate)
    for several in ({"a": encoder, "b": other}, (encoder, other), nn.ModuleList([encoder, other])):
        assert torch.equal(attack.fit(several, surrogate).delta, both.delta)
    assert attack.fit({"a": encoder, "b": other}, surrogate).provenance["encoders"] == ["a", "b"]
    if not isinstance(attack, FeatureUAP | AdvEncoder):
        return  # attacks with hooks, heads or bandits treat a stack as one encoder
    # a callable with stacked outputs (N, B, D) is equivalent
    stacked = attack.fit(lambda images: torch.stack([encoder(images), other(images)]), surrogate)
    torch.testing.assert_close(stacked.delta, both.delta, atol=attack.epsilon / 5, rtol=0)


@every_attack
def test_provenance_describes_the_run(attack, encoder, surrogate, tmp_path):
    made = attack.fit(encoder, surrogate)
    about = made.provenance
    assert about["attack"] == repr(attack)
    assert (about["images"], about["steps"], about["seed"]) == (40, attack.steps, attack.seed)
    assert about["final_loss"] is not None
    assert about["wall_s"] > 0
    assert json.loads(json.dumps(about)) == about
    made.save(tmp_path / "delta.safetensors")
    assert Perturbation.load(tmp_path / "delta.safetensors").provenance == about


@every_attack
def test_seconds_replace_steps(attack, encoder, surrogate):
    endless = replace(attack, steps=10**9)
    assert endless.fit(encoder, surrogate, seconds=0.2).provenance["steps"] >= 1
    assert endless.fit(encoder, surrogate, seconds=1e-9).provenance["steps"] == 1
    for seconds in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            attack.fit(encoder, surrogate, seconds=seconds)


@every_attack
def test_images_of_another_size(attack, encoder, surrogate):
    bigger = F.interpolate(surrogate, (24, 20), mode="bilinear")
    made = attack.fit(encoder, bigger)
    adversarial = made(bigger)
    assert length((adversarial - bigger)[0], attack.norm) <= attack.epsilon + 1e-6
    assert distance(encoder, made, bigger) > 0


@every_attack
def test_no_grad_of_the_caller_has_no_effect(attack, encoder, surrogate):
    plain = attack.fit(encoder, surrogate).delta
    with torch.no_grad():
        assert torch.equal(attack.fit(encoder, surrogate).delta, plain)
    with torch.inference_mode():
        assert torch.equal(attack.fit(encoder, surrogate.clone()).delta, plain)


@every_attack
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda images: images[:0], "to craft on, got 0"),
        (lambda images: images[:, :1], "expand"),
        (lambda images: images * 255, "images / 255"),
        (lambda images: (images * 255).byte(), r"images.float\(\) / 255"),
        (lambda images: images.half(), "float32"),
        (lambda images: images * float("nan"), "NaN"),
    ],
)
def test_bad_images_raise(attack, spoil, says, encoder, surrogate):
    with pytest.raises(ValueError, match=says):
        attack.fit(encoder, spoil(surrogate))


@every_attack
@pytest.mark.parametrize(
    ("encoder", "says"),
    [
        ([], "callable"),
        ({}, "callable"),
        ("open_clip:embedded", "callable"),
        (None, "callable"),
        (lambda images: images.mean((1, 2, 3)), r"features of shape \(16, D\)"),
        (lambda images: images[:, :, :5], r"features of shape \(16, D\)"),
        (lambda images: {"features": images}, "got dict"),
    ],
)
def test_bad_encoders_raise(attack, encoder, says, surrogate):
    with pytest.raises(ValueError, match=f"{says}|torch.nn.Module to hook"):
        attack.fit(encoder, surrogate)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: FeatureUAP(epsilon=10), "8/255, not 8"),
        (lambda: FeatureUAP(norm="l0"), "l0"),
        (lambda: FeatureUAP(loss="margin"), "unknown loss on features"),
        (lambda: FeatureUAP(steps=0), "steps"),
        (lambda: FeatureUAP(image_size=0), "image_size"),
        (lambda: FeatureUAP(loss="info_nce", batch_size=1), "info_nce"),
        (lambda: FeatureUAP(step_size=0.0), "step_size"),
        (lambda: FeatureUAP(momentum=1.0), "momentum"),
        (lambda: AdvEncoder(maps=1), "maps"),
        (lambda: AdvEncoder(learning_rate=0.0), "learning_rate"),
        (lambda: UNIVERSAL_ATTACKS.get("advencoder"), "did you mean 'adv_encoder'"),
    ],
)
def test_bad_settings_raise(build, says):
    with pytest.raises(ValueError, match=says):
        build()


def test_one_image_suffices_for_non_contrastive_losses(encoder, surrogate):
    assert FeatureUAP(image_size=SIDE, steps=2).fit(encoder, surrogate[:1]).provenance["images"] == 1
    with pytest.raises(ValueError, match="at least 2"):
        AdvEncoder(image_size=SIDE, steps=2).fit(encoder, surrogate[:1])


@dataclass(frozen=True, kw_only=True)
class OverBudget(UniversalAttack):
    """An attack whose run returns ten times the budget, and NaN."""

    def run(self, surrogate: Any, generator: torch.Generator) -> Tensor:
        delta = torch.full((3, SIDE, SIDE), 10 * self.epsilon)
        delta[0, 0, 0] = torch.nan
        return delta


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fit_projects_the_output_of_run(norm, encoder, surrogate):
    made = OverBudget(epsilon=EPSILON[norm], norm=norm).fit(encoder, surrogate)
    assert length(made.delta, norm) <= EPSILON[norm] + 1e-6
    assert made.provenance["final_loss"] is None


@pytest.mark.parametrize("loss", list(FEATURE_LOSSES))
def test_first_gradient_is_not_zero(loss, encoder, surrogate):
    """At the clean features every loss but InfoNCE has zero gradient; the random start avoids that point."""
    one_step = FeatureUAP(image_size=SIDE, steps=1, loss=loss, epsilon=0.1)
    start = FeatureUAP(image_size=SIDE, steps=1, loss=loss, epsilon=0.1, step_size=1e-9).fit(encoder, surrogate)
    moved = (one_step.fit(encoder, surrogate).delta - start.delta).abs() > 1e-4
    assert moved.float().mean() > 0.8


def test_high_pass_removes_low_frequencies():
    flat = torch.ones(3, 64, 64)
    rows = torch.arange(64.0)
    fast = torch.cos(2 * torch.pi * rows * 20 / 64).expand(3, 64, 64)
    slow = torch.cos(2 * torch.pi * rows * 3 / 64).expand(3, 64, 64)
    torch.testing.assert_close(high_pass(flat + slow + fast, 8), fast, atol=1e-5, rtol=0)
    passed = high_pass(torch.rand(3, 64, 64), 8)
    torch.testing.assert_close(high_pass(passed, 8), passed, atol=1e-5, rtol=0)  # idempotent


def test_generator_matches_the_published_one():
    network = PerturbationGenerator(4, 1024, torch.Generator().manual_seed(0))
    shapes = [tuple(layer.weight.shape) for layer in network.draw if isinstance(layer, nn.ConvTranspose2d)]
    assert shapes == [(100, 1024, 4, 4), (1024, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 3, 4, 4)]
    assert [tuple(mix.weight.shape) for mix in network.mix] == [(1, 4, 3, 3)] * 3
    assert network(torch.randn(4, 100, 1, 1)).shape == (3, 64, 64)
    assert abs(float(network.draw[3].weight.detach().std()) - 0.02) < 1e-3
    assert all(bool((mix.bias == 0).all()) for mix in network.mix)
