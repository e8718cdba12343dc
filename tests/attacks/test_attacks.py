"""Every registered attack, in every norm it supports: in budget, without side effects, and effective."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.attacks import APGD, ATTACKS, FEATURE_LOSSES, LOGIT_LOSSES, PGD, Attack, RayS, Square, frozen
from zepad_mm.attacks.base import project, random_delta, steepest
from zepad_mm.attacks.losses import margin, targeted
from zepad_mm.attacks.transfer import shrink_and_pad, smooth

EPSILON = {"linf": 8 / 255, "l2": 0.5}
EVERYTHING = {"linf": 1.0, "l2": 60.0}  # every image is inside the budget
QUICK: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 8},
    "apgd": {"steps": 12},
    "square": {"queries": 60},
    "rays": {"queries": 200},
}
CASES = [
    ATTACKS.get(name)(epsilon=EPSILON[norm], norm=norm, **QUICK.get(name, {}))
    for name in ATTACKS
    for norm in ATTACKS.get(name).norms
]
LABEL_ONLY = [attack for attack in CASES if not hasattr(attack, "loss")]
every_attack = pytest.mark.parametrize("attack", CASES, ids=repr)
every_attack_with_loss = pytest.mark.parametrize("attack", [a for a in CASES if a not in LABEL_ONLY], ids=repr)
every_loss = pytest.mark.parametrize("loss", [*LOGIT_LOSSES, *FEATURE_LOSSES])
CLASSES = 4


class TinyNet(nn.Module):
    """A convolutional network with batch norm and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * 16, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def make_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of four faint patterns."""
    patterns = torch.rand(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    noise = torch.randn(n, 3, 16, 16, generator=generator)
    return (0.5 + 0.3 * (patterns[labels] - 0.5) + 0.15 * noise).clamp(0, 1), labels


@pytest.fixture(scope="module")
def trained() -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TinyNet()
    images, labels = make_images(256, seed=1)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return net.eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return make_images(24, seed=2)


@pytest.fixture
def clean_net(trained: TinyNet) -> TinyNet:
    return copy.deepcopy(trained)


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((net(images).argmax(-1) == labels).float().mean())


def length(delta: Tensor, norm: str) -> float:
    flat = delta.double().flatten(1)
    return float((flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)).max())


def test_trained_net_is_accurate(trained, batch):
    assert accuracy(trained, *batch) > 0.95


@every_attack
@pytest.mark.parametrize("white", [False, True], ids=["photos", "black-and-white"])
def test_inside_the_budget_and_the_range(attack, white, trained, batch):
    images, labels = batch
    images = images.round() if white else images  # at the limits of [0, 1], clamping after projecting matters
    adversarial = attack(trained, images, labels)
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert not adversarial.requires_grad
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert length(adversarial - images, attack.norm) <= attack.epsilon + 1e-6
    assert not torch.equal(adversarial, images)


@every_attack
def test_zero_budget_changes_nothing(attack, trained, batch):
    adversarial = replace(attack, epsilon=0.0)(trained, *batch)
    assert torch.equal(adversarial, batch[0])
    assert adversarial is not batch[0]


@every_attack
def test_an_empty_batch_stays_empty(attack, trained, batch):
    assert attack(trained, batch[0][:0], batch[1][:0]).shape == (0, 3, 16, 16)


@every_attack
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_model_is_restored(attack, training, clean_net, batch):
    clean_net.train(training)
    clean_net.body[1].eval()  # mixed modes must be restored too
    clean_net.head.bias.requires_grad_(False)
    modes = [module.training for module in clean_net.modules()]
    requires_grad = {name: parameter.requires_grad for name, parameter in clean_net.named_parameters()}
    state = copy.deepcopy(clean_net.state_dict())
    images, labels = batch[0].clone().requires_grad_(True), batch[1]
    rng = torch.get_rng_state()
    attack(clean_net, images, labels)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in clean_net.modules()] == modes
    assert {name: parameter.requires_grad for name, parameter in clean_net.named_parameters()} == requires_grad
    assert all(parameter.grad is None for parameter in clean_net.parameters())
    assert images.grad is None
    assert torch.equal(images, batch[0])
    for name, tensor in clean_net.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@every_attack
def test_model_is_restored_after_an_error(attack, clean_net, batch):
    clean_net.train()
    with pytest.raises(ValueError, match="labels"):
        attack(clean_net, batch[0], None)
    assert clean_net.training
    assert all(parameter.requires_grad for parameter in clean_net.parameters())


@pytest.mark.parametrize("wrap", ["method", "partial", "closure", "partial of an argument"])
def test_frozen_finds_modules_behind_functions(wrap, clean_net):
    clean_net.train()
    models = {
        "method": clean_net.features,
        "partial": partial(clean_net),
        "closure": lambda images: clean_net(images) / 2,
        "partial of an argument": partial(lambda net, images: net(images), clean_net),
    }
    with frozen(models[wrap]):
        assert not clean_net.training
        assert not any(parameter.requires_grad for parameter in clean_net.parameters())
    assert clean_net.training
    assert all(parameter.requires_grad for parameter in clean_net.parameters())


@every_attack_with_loss
def test_seed_determines_the_result(attack, trained, batch):
    attack = replace(attack, loss="feature_l2")  # runs all steps on every sample
    first, again, other = (attack(trained, *batch, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(attack(trained, *batch), attack(trained, *batch))  # default: seed 0


@every_attack
def test_larger_budget_is_stronger(attack, trained, batch):
    clean = accuracy(trained, *batch)
    scale = EVERYTHING[attack.norm]
    budgets = [0.0, attack.epsilon / 2, 2 * attack.epsilon, scale]
    left = [accuracy(trained, replace(attack, epsilon=e)(trained, *batch), batch[1]) for e in budgets]
    assert left == sorted(left, reverse=True), left
    assert left[0] == clean
    assert left[-1] == 0, left


@every_attack
def test_no_grad_and_inference_mode_of_the_caller_have_no_effect(attack, trained, batch):
    plain = attack(trained, *batch)
    with torch.no_grad():
        assert torch.equal(attack(trained, *batch), plain)
    with torch.inference_mode():
        images = batch[0].clone()
        assert torch.equal(attack(trained, images, batch[1]), plain)


@every_attack_with_loss
def test_misclassified_images_stay_misclassified_when_scored_again(attack, trained, batch):
    images, labels = batch
    seen: list[Tensor] = []

    def model(pixels: Tensor) -> Tensor:
        seen.append(pixels.detach())
        return trained(pixels)

    attack = replace(attack, epsilon=6 * attack.epsilon)
    adversarial = attack(model, images, labels)
    passes = [len(pixels) for pixels in seen]
    with torch.no_grad():
        singly = torch.cat([trained(one[None]) for one in adversarial])
        together = trained(adversarial)
    assert ((singly.argmax(-1) == labels) == (together.argmax(-1) == labels)).all()
    assert (together.argmax(-1) != labels).any()
    if len(passes) > 3:  # misclassified samples leave the batch; attacks of one step have no pass to save
        assert sum(passes) < len(passes) * max(passes)
    seen.clear()
    attack(model, images, torch.where(torch.arange(len(labels)) % 2 == 0, labels, (labels + 1) % CLASSES))
    if len(passes) > 1:  # nor are those attacked that are wrong from the start
        assert sum(map(len, seen)) < sum(passes)


@every_attack
def test_samples_wrong_from_the_start_are_unchanged(attack, trained, batch):
    images, labels = batch
    labels = (labels + 1) % CLASSES
    assert accuracy(trained, images, labels) == 0
    assert torch.equal(attack(trained, images, labels), images)


@every_attack_with_loss
@every_loss
def test_every_loss_changes_every_image(attack, loss, trained, batch):
    images, labels = batch
    model = trained if loss in LOGIT_LOSSES else trained.features
    attack = replace(attack, loss=loss)
    adversarial = attack(model, images, labels if loss in LOGIT_LOSSES else None)
    assert length(adversarial - images, attack.norm) <= attack.epsilon + 1e-6
    assert (adversarial != images).flatten(1).any(1).all()  # the start is random, where feature losses have a gradient
    score = (LOGIT_LOSSES if loss in LOGIT_LOSSES else FEATURE_LOSSES).get(loss)
    with torch.no_grad():
        target = labels if loss in LOGIT_LOSSES else model(images)
        rise = score(model(adversarial), target) - score(model(images), target)
    assert rise.mean() > 0


@every_attack_with_loss
@every_loss
def test_losses_accept_several_branches(attack, loss, trained, clean_net, batch):
    clean_net.head.weight.data *= 0.7
    parts = [trained, clean_net] if loss in LOGIT_LOSSES else [trained.features, clean_net.features]

    def branches(images: Tensor) -> Tensor:
        return torch.stack([part(images) for part in parts])  # (N, B, C)

    adversarial = replace(attack, loss=loss, epsilon=EVERYTHING[attack.norm])(branches, *batch)
    assert adversarial.shape == batch[0].shape
    if loss == "margin":
        with torch.no_grad():
            assert (branches(adversarial).argmax(-1) != batch[1]).all()


@every_attack
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (None, "true labels"),
        (torch.zeros(3, dtype=torch.long), r"\(24,\) integer"),
        (torch.zeros(24), "float32"),
        (torch.full((24,), CLASSES), "classes below 4"),
        (torch.full((24,), -1), "at least 0"),
    ],
)
def test_bad_labels_raise(attack, labels, says, trained, batch):
    with pytest.raises(ValueError, match=says):
        attack(trained, batch[0], labels)


@every_attack
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda images: images[:, :1], "expand"),
        (lambda images: images[0], r"images\[None\]"),
        (lambda images: images * 255, "images / 255"),
        (lambda images: (images * 255).byte(), r"images.float\(\) / 255"),
        (lambda images: images / 0 - images / 0, "NaN"),
        (lambda images: images.bfloat16(), "autocast"),
        (lambda images: (images * 255).requires_grad_(True), "images / 255"),  # checked before the loop
    ],
)
def test_bad_images_raise(attack, spoil, says, trained, batch):
    with pytest.raises(ValueError, match=says):
        attack(trained, spoil(batch[0]), batch[1])


@every_attack
@pytest.mark.parametrize(
    "model",
    [lambda images: images.mean((1, 2, 3)), lambda images: images.flatten(1)[:1], lambda images: {"logits": images}],
    ids=["no class axis", "one row", "dictionary"],
)
def test_bad_models_raise(attack, model, batch):
    with pytest.raises(ValueError, match=r"model: expected outputs of shape \(24, C\)"):
        attack(model, *batch)


@every_attack
def test_nan_outputs_are_no_success(attack, trained, batch):
    def broken(images: Tensor) -> Tensor:
        return trained(images) * torch.where(images.mean((1, 2, 3)) > 0.5, torch.nan, 1.0)[:, None]

    adversarial = attack(broken, *batch)
    assert torch.isfinite(adversarial).all()
    assert length(adversarial - batch[0], attack.norm) <= attack.epsilon + 1e-6


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: PGD(epsilon=8), "8/255, not 8"),
        (lambda: PGD(norm="l1"), "l1"),
        (lambda: PGD(norm="l2", epsilon=-1.0), "L2 length"),
        (lambda: PGD(norm="l2", epsilon=float("nan")), "L2 length"),
        (lambda: PGD(steps=0), "steps"),
        (lambda: PGD(restarts=0), "restarts"),
        (lambda: PGD(step_size=-1.0), "step_size"),
        (lambda: PGD(loss="margn"), "margin"),
        (lambda: PGD(loss="feature_l2", random_start=False), "random_start=True"),
        (lambda: APGD(loss="target"), "unknown loss"),
        (lambda: APGD(targets=0), "targets"),
        (lambda: PGD(momentum=1.0), "momentum"),
        (lambda: ATTACKS.get("di")(diversity=2.0), "diversity"),
        (lambda: RayS(queries=0), "queries"),
        (lambda: Square(norm="l2"), "Square"),
        (lambda: Square(queries=0), "queries"),
        (lambda: Square(area=0.0), "area"),
        (lambda: ATTACKS.get("pdg"), "did you mean 'pgd'"),
    ],
)
def test_bad_settings_raise(build, says):
    with pytest.raises(ValueError, match=says):
        build()


@dataclass(frozen=True, kw_only=True)
class Cheat(Attack):
    """An attack whose run leaves the budget and the range, and returns NaN."""

    shift: float = 5.0

    def run(
        self, model: Any, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        images += self.shift  # in place, too
        images[0, 0, 0, 0] = torch.nan
        return images


@dataclass(frozen=True, kw_only=True)
class WrongShape(Attack):
    def run(
        self, model: Any, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        return images[:1]


@pytest.mark.parametrize("norm", list(EPSILON))
def test_call_projects_the_output_of_run(norm, trained, batch):
    before = batch[0].clone()
    adversarial = Cheat(epsilon=EPSILON[norm], norm=norm)(trained, *batch)
    assert torch.equal(batch[0], before)
    assert length(adversarial - before, norm) <= EPSILON[norm] + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    with pytest.raises(ValueError, match="WrongShape"):
        WrongShape(epsilon=EPSILON[norm], norm=norm)(trained, *batch)


@pytest.mark.parametrize("loss", ["targeted", "margin", "ce"])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(loss, classes, trained, batch):
    images, labels = batch
    keep = labels < classes
    attack = APGD(loss=loss, epsilon=0.2, steps=10)
    adversarial = attack(lambda pixels: trained(pixels)[:, :classes], images[keep], labels[keep])
    with torch.no_grad():
        assert (trained(adversarial)[:, :classes].argmax(-1) != labels[keep]).all()


def test_dlr_needs_three_classes_and_other_logit_losses_two(trained, batch):
    images, labels = batch[0], batch[1] % 2
    with pytest.raises(ValueError, match=r"at least 3 classes.*margin"):
        PGD(loss="dlr")(lambda pixels: trained(pixels)[:, :2], images, labels)
    with pytest.raises(ValueError, match="at least 2 classes"):
        PGD()(lambda pixels: trained(pixels)[:, :1], images, labels * 0)


def test_info_nce_needs_two_images(trained, batch):
    with pytest.raises(ValueError, match="feature_cosine"):
        PGD(loss="info_nce")(trained, batch[0][:1])


def test_generator_of_another_device_raises(trained, batch):
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="CPU generator"):
        PGD()(trained, *batch, generator=Elsewhere())


def test_margin_is_positive_exactly_when_wrong(trained, batch):
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 5
    assert torch.equal(margin(logits, labels) > 0, logits.argmax(-1) != labels)


@pytest.mark.parametrize("loss", list(LOGIT_LOSSES))
def test_branches_are_summed(loss):
    logits = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5
    score = LOGIT_LOSSES.get(loss)
    torch.testing.assert_close(score(logits, labels), sum(score(part, labels) for part in logits))


@pytest.mark.parametrize("loss", list(FEATURE_LOSSES))
def test_feature_losses_keep_the_branch_axis(loss):
    generator = torch.Generator().manual_seed(0)
    features, clean = torch.randn(2, 3, 6, 5, generator=generator)
    score = FEATURE_LOSSES.get(loss)
    torch.testing.assert_close(
        score(features, clean), torch.stack([score(a, b) for a, b in zip(features, clean, strict=True)])
    )


@pytest.mark.parametrize("classes", [3, 6])
def test_targeted_loss_is_scale_invariant_from_four_classes(classes):
    logits = torch.randn(8, classes, generator=torch.Generator().manual_seed(0))
    labels, rivals = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    same = torch.allclose(targeted(logits, labels, rivals), targeted(100 * logits, labels, rivals), atol=1e-5)
    assert same == (classes >= 4)


def test_cross_entropy_saturates_where_margin_does_not(trained, batch):
    """At CLIP's logit scale; the reason why margin is the default."""

    def sure(images: Tensor) -> Tensor:
        return 1000 * trained(images)

    left = {loss: accuracy(trained, PGD(loss=loss, epsilon=0.05)(sure, *batch), batch[1]) for loss in ("ce", "margin")}
    assert left["margin"] <= left["ce"]


def test_restarts_never_weaken_the_attack(trained, batch):
    weak = PGD(epsilon=5 / 255, steps=1)
    once, often = (accuracy(trained, replace(weak, restarts=n)(trained, *batch), batch[1]) for n in (1, 10))
    assert often <= once


def test_stop_when_wrong_false_runs_all_steps(trained, batch):
    calls: list[int] = []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return trained(images)

    PGD(epsilon=1.0, steps=3, stop_when_wrong=False)(counted, *batch)
    assert calls == [24] * 4


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_budget_without_leaving_it(norm):
    like = torch.zeros(64, 3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    delta = random_delta(like, 0.3, norm, generator)
    assert 0.25 < length(delta, norm) <= 0.3 + 1e-6
    assert torch.equal(project(delta, 0.3, norm), delta) or norm == "l2"
    assert (delta != 0).flatten(1).any(1).all()


def test_l2_direction_of_tiny_gradients_is_finite():
    gradient = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e-30
    torch.testing.assert_close(steepest(gradient, "l2").flatten(1).norm(dim=1), torch.ones(2))
    assert torch.equal(steepest(torch.zeros(1, 3, 2, 2), "l2"), torch.zeros(1, 3, 2, 2))


def test_modules_of_terminates_on_recursive_functions() -> None:
    network = torch.nn.Linear(2, 2)

    def chain():
        def first(images):
            return second(images) if len(images) > 4 else network(images)

        def second(images):
            return first(images[:4])

        return first

    with frozen(chain()):
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_shrink_and_pad_keeps_the_shape_and_is_the_identity_at_full_size() -> None:
    images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    varied = shrink_and_pad(images, 0.5, torch.Generator().manual_seed(1))
    assert varied.shape == images.shape
    assert (varied == 0).any()
    torch.testing.assert_close(shrink_and_pad(images, 1.0, torch.Generator().manual_seed(1)), images)


def test_smooth_keeps_a_constant_inside() -> None:
    gradient = torch.full((1, 3, 64, 64), 2.0)
    torch.testing.assert_close(smooth(gradient)[..., 2:-2, 2:-2], gradient[..., 2:-2, 2:-2])


def test_rays_sees_labels_alone_and_stops_at_its_queries(trained, batch):
    calls: list[int] = []

    def decision(images: Tensor) -> Tensor:
        calls.append(len(images))
        return F.one_hot(trained(images).argmax(-1), CLASSES).float()

    images, labels = batch
    adversarial = RayS(epsilon=0.2, queries=150)(decision, images, labels)
    assert len(calls) <= 150
    assert accuracy(trained, adversarial, labels) < accuracy(trained, images, labels) - 0.5
