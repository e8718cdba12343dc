"""FARE: the constraint on clean images, distances without a scale, soft labels without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.test_fit import colours, quick, run, same, tiny_student
from zepad_mm.data import LabelledImages
from zepad_mm.defences import FARE, Batch, Student
from zepad_mm.training import fit
from zepad_mm.utils.stopping import Stopped


def batch_of(student: Student, images: Tensor, moved: float = 0.0, scale: float = 1.0) -> Batch:
    """Images with targets that lie ``moved`` from the student's features, relative to their norm."""
    with torch.no_grad():
        features = student.encoder(images)
    original = scale * (features + moved * features.norm(dim=-1, keepdim=True) / features.shape[1] ** 0.5)
    return Batch(images, torch.arange(len(images)) % 3, torch.arange(len(images)), original)


@pytest.fixture
def student() -> Student:
    return tiny_student("zero_shot")


def test_multiplier_rises_when_the_constraint_is_violated_and_falls_to_zero_else(student: Student) -> None:
    images, defence = colours(8).images, FARE(rho=0.05, dual_rate=0.1)
    defence.prepare(student)
    found = []
    for moved in (0.5, 0.5, 0.5, *6 * [0.0]):
        batch = batch_of(student, images, moved)
        parts = defence.loss(student, batch, images).parts
        assert float(parts["multiplier"]) == pytest.approx(float(student.multiplier))
        defence.update(student, parts)
        found.append(float(student.multiplier))
    relative = defence.loss(student, batch_of(student, images, 0.5), images).parts["relative_clean"]
    assert 0 < found[0] < found[1] < found[2]
    assert found[0] == pytest.approx(0.1 * (float(relative) / 0.05 - 1), rel=1e-4)
    assert found[2] > found[3] > found[4] - 1e-9
    assert found[-1] == max(0, found[2] - 0.6)


def test_multiplier_weighs_the_distance_of_clean_images_and_not_the_attack(student: Student) -> None:
    defence, plain = FARE(rho=0.1), FARE(clean_weight=2.5)
    batch = batch_of(student, colours(8).images, 0.3)
    attacked = (batch.images + 0.02).clamp(0, 1)
    with pytest.raises(ValueError, match=r"defence\.prepare"):
        defence.loss(student, batch, attacked)
    defence.prepare(student)
    student.multiplier.fill_(2.5)
    torch.testing.assert_close(*(one.loss(student, batch, attacked).total for one in (defence, plain)))
    torch.testing.assert_close(*(one.attack_loss(student, batch)(attacked) for one in (defence, plain)))


@pytest.mark.parametrize("options", [{}, {"rho": 0.1, "clean_weight": 0.5}, {"soft_label_weight": 1.0}])
def test_scale_of_the_features_does_not_change_the_loss(options: dict[str, float]) -> None:
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            return 10 * self.inner(images)

    defence, losses = FARE(scale_free=True, **options), []
    for scale in (1.0, 10.0):
        student = tiny_student("linear")
        batch = batch_of(student, colours(8).images, 0.3, scale)
        if scale > 1:
            student.encoder.backbone = Scaled(student.encoder.backbone)
        defence.prepare(student)
        losses.append(defence.loss(student, batch, (batch.images + 0.02).clamp(0, 1)).total)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("anchors", ["images", "names"])
def test_soft_labels_need_no_labels(anchors: str, student: Student, tmp_path: Path) -> None:
    defence = FARE(soft_label_weight=1.0, soft_labels=anchors, temperature=0.2, attack_steps=1)
    batch = batch_of(student, colours(8).images)
    batch = replace(batch, labels=torch.full((8,), -1))
    assert float(defence.loss(student, batch, batch.images).parts["kl_attacked"]) == pytest.approx(0, abs=1e-5)
    attacked = defence.craft(student, batch, 0.1, torch.Generator().manual_seed(0))
    found = defence.loss(student, batch, attacked)
    assert float(found.parts["kl_attacked"].detach()) > 1e-5
    difference = found.total - FARE().loss(student, batch, attacked).total
    torch.testing.assert_close(difference, found.parts["kl_attacked"], rtol=1e-3, atol=1e-4)
    data = colours()
    unlabelled = LabelledImages(data.images, torch.full((len(data),), -1), (), "unlabelled")
    result = fit(student, unlabelled, None, defence, quick(steps=2), out=tmp_path)
    assert result.best_step == 2
    assert defence.per_sample == (anchors == "names")


def test_clean_rows_of_the_batch_measure_the_constraint(student: Student) -> None:
    images, defence = colours(8).images, FARE(rho=0.1, clean_fraction=0.25)
    defence.prepare(student)
    student.multiplier.fill_(2.0)
    batch = batch_of(student, images, 0.3)
    attacked = torch.cat([images[:2], (images[2:] + 0.1).clamp(0, 1)])
    found = defence.loss(student, batch, attacked)
    distances = (student.encoder(attacked) - batch.original).square().sum(-1)
    torch.testing.assert_close(found.total, distances[2:].mean() + 2.0 * distances[:2].mean())
    torch.testing.assert_close(
        found.parts["relative_clean"], (distances[:2] / batch.original[:2].square().sum(-1)).mean().detach()
    )


def test_universal_perturbations_grow_stronger_and_attack_their_share_of_the_batch(student: Student) -> None:
    defence = FARE(universal_share=0.5, universal_epsilon=0.1, universal_count=2, epsilon=0.02, clean_fraction=0.25)
    batch = batch_of(student, 0.2 + 0.6 * colours(8).images)
    with pytest.raises(ValueError, match=r"defence\.prepare"):
        defence.craft(student, batch, 0.02, torch.Generator().manual_seed(0))
    defence.prepare(student)
    change, distances = [], []
    for _ in range(15):
        attacked = defence.craft(student, batch, 0.02, torch.Generator().manual_seed(0))
        change.append((attacked - batch.images).abs().amax((1, 2, 3)))
        distances.append(float(defence.attack_loss(student, batch)(attacked)[2:6].mean().detach()))
    assert distances[-1] > 1.2 * distances[0]
    assert float(change[-1][:2].max()) == 0  # the clean rows
    assert (change[-1][2:6] > 0.09).all()  # half of the batch by universal perturbations
    assert (change[-1][2:6] <= 0.1 + 1e-6).all()
    assert (change[-1][6:] <= 0.02 + 1e-6).all()  # the rest by attacks on each image
    added = (attacked - batch.images)[2:6]
    torch.testing.assert_close(added[0], added[2])  # two perturbations in turn
    assert not torch.allclose(added[0], added[1])
    assert all(parameter.grad is None for parameter in student.parameters())
    half = defence.craft(student, batch, 0.01, torch.Generator().manual_seed(0))  # a budget that still grows
    assert float((half - batch.images)[2:6].abs().max()) <= 0.05 + 1e-6
    small = replace(batch, images=batch.images[..., :6, :6])
    assert defence.craft(student, small, 0.02, torch.Generator()).shape == small.images.shape


def test_original_encoder_is_the_target_of_a_student_that_was_tuned_before(tmp_path: Path) -> None:
    data, defence = colours(), FARE(attack_steps=1)
    moved, public = tiny_student("zero_shot"), tiny_student("zero_shot").encoder
    with torch.no_grad():
        for parameter in moved.encoder.parameters():
            parameter.add_(0.05 * parameter.std().nan_to_num() * torch.ones_like(parameter))

    def distance() -> float:
        with torch.no_grad():
            return float((moved.encoder(data.images) - public(data.images)).square().sum(-1).mean())

    before = distance()
    fit(moved, data, None, defence, quick(steps=20), out=tmp_path, original=public)
    assert distance() < before
    with pytest.raises(ValueError, match="original_checksum"):
        fit(tiny_student("zero_shot"), data, None, defence, quick(steps=30), out=tmp_path)


def test_bad_values_raise_errors_that_name_the_field() -> None:
    for field, value in (("rho", 0.0), ("temperature", 0.0), ("soft_label_weight", -1.0), ("soft_labels", "words"),
                         ("universal_share", 1.5), ("universal_count", 0), ("universal_epsilon", 10)):  # fmt: skip
        with pytest.raises(ValueError, match=field):
            FARE(**{field: value})
    student = tiny_student("linear")
    batch = batch_of(student, colours(8).images)
    with pytest.raises(ValueError, match="zero-shot head, got LinearHead"):
        FARE(soft_label_weight=1.0, soft_labels="names").loss(student, batch, batch.images)


def test_resumed_run_has_the_same_multiplier_and_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defence = FARE(rho=0.01, scale_free=True, attack_steps=1, universal_share=0.5)
    settings = quick(steps=8, checkpoint_every=3, ema_decay=0.5, augment="photo", selection="last")
    whole, _ = run(tmp_path / "whole", defence, settings)
    assert float(whole.multiplier) > 0
    update = FARE.update

    def stopping(self: FARE, student: Student, parts: dict[str, Tensor]) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise Stopped("here")
        update(self, student, parts)

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(FARE, "update", stopping)
        with pytest.raises(Stopped):
            run(tmp_path / "parts", defence, settings)
    resumed, _ = run(tmp_path / "parts", defence, settings)
    assert same(whole, resumed)
    plain, _ = run(tmp_path / "plain", defence, quick(**{**settings.to_dict(), "ema_decay": 0.0}))
    assert not same(plain.encoder, whole.encoder)
