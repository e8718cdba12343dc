"""Tuning objectives: every registered one honours the contract; the topology loss is the one in the method's text."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.defences import (
    DEFENCES,
    FARE,
    Batch,
    GenAF,
    GenAFReleased,
    Student,
    TeCoA,
    make_defence,
    robustness_contributions,
    topology_loss,
    unfreeze_redundant,
)
from zepad_mm.encoders import Encoder, Preprocess

NAMES = DEFENCES.names()
ADVERSARIAL = [name for name in NAMES if name != "clean"]


def tiny_student(seed: int = 0, classes: int = 4) -> Student:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        preprocess = Preprocess(image_size=12, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
        return Student(Encoder(backbone, preprocess, 32, "test:tiny").eval(), nn.Linear(32, classes))


def tiny_batch(student: Student, n: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(n, 3, 12, 12, generator=generator)
    with torch.no_grad():
        original = student.encoder(images) + 0.01
    return Batch(images, torch.arange(n) % 4, torch.arange(n), original)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_finite_and_differentiable_and_the_config_round_trips(name: str) -> None:
    defence, student = make_defence(name), tiny_student()
    batch = tiny_batch(student)
    loss = defence.loss(student, batch, defence.craft(student, batch, defence.epsilon, generator()))
    assert loss.total.ndim == 0
    assert torch.isfinite(loss.total)
    assert all(not part.requires_grad and math.isfinite(float(part)) for part in loss.parts.values())
    student.zero_grad()
    loss.total.backward()
    assert all(parameter.grad is not None for parameter in student.encoder.parameters())
    assert (next(student.head.parameters()).grad is not None) == defence.trains_head
    assert type(defence).from_dict(defence.to_dict()) == defence
    assert defence.name == name


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_craft_stays_in_budget_raises_the_attack_loss_and_restores_the_student(name: str) -> None:
    defence, student = make_defence(name, {"clean_fraction": 0.25}), tiny_student()
    batch = tiny_batch(student)
    student.train()
    student.head.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    rng = torch.get_rng_state()
    adversarial = defence.craft(student, batch, defence.epsilon, generator())
    assert adversarial.shape == batch.images.shape
    assert not adversarial.requires_grad
    assert torch.equal(adversarial[:2], batch.images[:2])
    assert float((adversarial - batch.images).abs().max()) <= defence.epsilon + 1e-6
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert all(module.training for module in student.modules())
    assert not student.head.weight.requires_grad
    leaks = isinstance(defence, GenAF) and defence.parameter_gradient_leak
    assert all((parameter.grad is not None) == leaks for parameter in student.encoder.parameters())
    student.eval()
    with torch.no_grad():
        objective = defence.attack_loss(student, batch)
        assert objective(adversarial)[2:].sum() > objective(batch.images)[2:].sum()


@pytest.mark.parametrize("name", NAMES)
def test_craft_returns_the_images_at_zero_epsilon(name: str) -> None:
    student = tiny_student()
    batch = tiny_batch(student)
    assert torch.equal(make_defence(name).craft(student, batch, 0.0, generator()), batch.images)


def test_warm_up_scales_budget_and_step_alike() -> None:
    defence = TeCoA(epsilon=0.04, attack_steps=2, attack_step_size=0.03)
    assert defence.step_size(0.01) == pytest.approx(0.0075)
    student = tiny_student()
    batch = tiny_batch(student)
    adversarial = defence.craft(student, batch, 0.01, generator())
    assert float((adversarial - batch.images).abs().max()) <= 0.01 + 1e-6


def test_bad_values_raise_errors_that_name_the_field() -> None:
    with pytest.raises(ValueError, match="8/255, not 8"):
        TeCoA(epsilon=8)
    with pytest.raises(ValueError, match="clean_fraction"):
        TeCoA(clean_fraction=1.0)
    with pytest.raises(ValueError, match="attack_steps"):
        TeCoA(attack_steps=0)
    with pytest.raises(ValueError, match="topology_target"):
        GenAF(topology_target="both")
    with pytest.raises(ValueError, match="did you mean 'tecoa'"):
        make_defence("tecoaa")
    with pytest.raises(ValueError, match="no key 'epsilom'; did you mean 'epsilon'"):
        make_defence("tecoa", {"epsilom": 0.1})


def naive_topology(model: Tensor, target: Tensor, labels: Tensor, hardness: Tensor | None) -> float:
    """Method section 3.2, entry by entry."""
    n = len(model)

    def local(rows: list[list[float]]) -> list[list[float]]:
        def cosine(a: list[float], b: list[float]) -> float:
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))

        d = [[1 - cosine(rows[i], rows[j]) for j in range(n)] for i in range(n)]
        rho = [min(d[i][k] for k in range(n) if k != i) for i in range(n)]
        return [[0.0 if i == j else d[i][j] - rho[i] for j in range(n)] for i in range(n)]

    def clip(value: float) -> float:
        return min(max(value, 1e-7), 2 - 1e-7)

    a, b = local(model.tolist()), local(target.tolist())
    total = 0.0
    for i in range(n):
        t_row, u_row = [], []
        for j in range(n):
            t_row.append(clip(a[i][j]))
            u = b[i][j]
            if hardness is not None:
                s = math.tanh((float(hardness[i]) + float(hardness[j])) / 32)
                m = -1 if int(labels[i]) == int(labels[j]) else 1
                u = (1 - s) * u + 2 * m * s
            u_row.append(clip(u))
        q_sum, p_sum = sum((2 - t) / 2 for t in t_row), sum((2 - u) / 2 for u in u_row)
        for j in range(n):
            q, p = (2 - t_row[j]) / 2 / q_sum, (2 - u_row[j]) / 2 / p_sum
            total += p * math.log((p + 1e-7) / (q + 1e-7))
            total += (1 - p) * math.log((1 - p + 1e-7) / (1 - q + 1e-7))
    return total


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("n", [2, 7, 16])
def test_topology_loss_equals_the_double_loop_of_the_method(n: int, aware: bool) -> None:
    draw = torch.Generator().manual_seed(n)
    model = torch.randn(n, 5, generator=draw, dtype=torch.float64) * 3
    target = torch.randn(n, 5, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 3, (n,), generator=draw)
    hardness = torch.rand(n, generator=draw, dtype=torch.float64) * 8 if aware else None
    expected = naive_topology(model, target, labels, hardness)
    assert float(topology_loss(model, target, labels, hardness)) == pytest.approx(expected, rel=2e-3, abs=2e-5)


def test_topology_loss_is_computed_in_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    model, target = (torch.randn(32, 10, generator=generator) for _ in range(2))
    labels = torch.arange(32) % 10
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = topology_loss(model, target, labels)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, topology_loss(model, target, labels))


def test_topology_loss_is_zero_for_equal_sides_and_for_one_image_and_grows_with_the_batch() -> None:
    logits = torch.randn(128, 10, generator=generator())
    labels = torch.arange(128) % 10
    assert float(topology_loss(logits, logits, labels)) == pytest.approx(0, abs=1e-4)
    assert float(topology_loss(logits[:1], logits[:1], labels[:1])) == 0
    other = torch.randn(128, 10, generator=torch.Generator().manual_seed(5))
    ratio = topology_loss(logits, other, labels) / topology_loss(logits[:32], other[:32], labels[:32])
    assert 3 < float(ratio) < 5.5  # linear: 4


def test_gen_af_target_gets_a_gradient_only_in_the_release() -> None:
    """With an equal CE the two configurations differ in which logits the topology term reaches."""

    class Table(nn.Module):
        """Logits that can be asked for their gradient: the first forward's rows, then the second's."""

        def __init__(self) -> None:
            super().__init__()
            self.attacked = nn.Parameter(torch.randn(8, 4, generator=torch.Generator().manual_seed(2)))
            self.clean = nn.Parameter(torch.randn(8, 4, generator=torch.Generator().manual_seed(3)))
            self.calls = 0

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            if len(images) == 16:
                rows = torch.cat([self.attacked, self.clean])
            else:
                rows = (self.attacked, self.clean)[self.calls]
                self.calls += 1
            return rows, rows

    batch = tiny_batch(tiny_student())
    corrected, released = Table(), Table()
    GenAF().loss(corrected, batch, batch.images).total.backward()  # type: ignore[arg-type]
    assert corrected.clean.grad is None or float(corrected.clean.grad.abs().sum()) == 0
    GenAFReleased().loss(released, batch, batch.images).total.backward()  # type: ignore[arg-type]
    assert released.calls == 2
    assert float(released.clean.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert float(released.attacked.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_gen_af_loss_is_ce_plus_weighted_topology() -> None:
    student = tiny_student()
    batch = tiny_batch(student)
    adversarial = (batch.images + 0.05).clamp(0, 1)
    with torch.no_grad():
        a, c = student.logits(adversarial), student.logits(batch.images)
        hardness = F.cross_entropy(c, batch.labels, reduction="none")
        ce = F.cross_entropy(a, batch.labels)
        corrected = ce + 20 * 256 / 8 * topology_loss(a, c, batch.labels, hardness)
        released = ce + 20 * topology_loss(c, a, batch.labels, hardness)
    assert float(GenAF().loss(student, batch, adversarial).total) == pytest.approx(float(corrected), rel=1e-4)
    assert float(GenAFReleased().loss(student, batch, adversarial).total) == pytest.approx(float(released), rel=1e-4)


def test_gen_af_released_attack_leaks_its_parameter_gradients() -> None:
    """One step without mean and std: what is left in .grad is the gradient of CE at the clean pixels."""
    student = tiny_student()
    batch = tiny_batch(student)
    GenAFReleased(attack_steps=1).craft(student, batch, 0.03, generator())
    leaked = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
    logits = student.head(student.encoder.backbone(batch.images))
    expected = torch.autograd.grad(F.cross_entropy(logits, batch.labels), list(student.parameters()))
    assert len(leaked) == len(expected)
    for got, wanted in zip(leaked, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_fare_measures_the_distance_to_the_original_features() -> None:
    student = tiny_student()
    batch = tiny_batch(student)  # original = features + 0.01
    defence = FARE(clean_weight=0.5)
    total = defence.loss(student, batch, batch.images).total
    assert float(total) == pytest.approx(1.5 * 32 * 0.01**2, rel=1e-3)
    with pytest.raises(ValueError, match="original"):
        FARE().loss(student, Batch(batch.images, batch.labels, batch.indices), batch.images)


def test_fare_with_labels_adds_cross_entropy_to_loss_and_attack() -> None:
    student = tiny_student()
    batch = tiny_batch(student)
    plain, labelled = FARE(), FARE(label_weight=3.0)
    ce = F.cross_entropy(student.logits(batch.images), batch.labels, reduction="none")
    expected = plain.loss(student, batch, batch.images).total + 3 * ce.mean()
    torch.testing.assert_close(labelled.loss(student, batch, batch.images).total, expected)
    adversarial = [defence.attack_loss(student, batch)(batch.images) for defence in (plain, labelled)]
    torch.testing.assert_close(adversarial[1], adversarial[0] + 3 * ce)
    with pytest.raises(ValueError, match="label_weight"):
        FARE(label_weight=-1.0)


def test_unfreeze_redundant_selects_the_least_contributing_layers() -> None:
    student, batch = tiny_student(), tiny_batch(tiny_student())
    student.encoder.backbone.append(nn.Linear(32, 32))
    student.encoder.backbone.append(nn.Linear(32, 32))
    with torch.no_grad():
        student.encoder.backbone[
            -2
        ].weight.zero_()  # nothing passes it: its own weight and the first one's do not matter
    before = {name: value.clone() for name, value in student.state_dict().items()}
    found = robustness_contributions(student, batch.images, batch.labels, epochs=2, batch_size=4)
    assert list(found) == ["backbone.0", "backbone.5", "backbone.6"]
    assert found["backbone.0"] == pytest.approx(0, abs=1e-7)
    assert found["backbone.6"] > 1e-4
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert unfreeze_redundant(student, found, 0.34) == ["backbone.0"]
    thawed = {name for name, parameter in student.encoder.named_parameters() if parameter.requires_grad}
    assert thawed == {"backbone.0.weight", "backbone.0.bias"}
    assert all(parameter.requires_grad for parameter in student.head.parameters())
    with pytest.raises(ValueError, match="share"):
        unfreeze_redundant(student, found, 0.0)
    with pytest.raises(ValueError, match="at least one image"):
        robustness_contributions(student, batch.images[:0], batch.labels[:0])
