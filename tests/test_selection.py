"""The fusion rule and the detector are selected on validation images, by attack."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.models import CLASSES, make_gated_zepad, make_zepad
from zepad_mm import selection
from zepad_mm.data import LabelledImages
from zepad_mm.models.fusion import RULES
from zepad_mm.models.zepad import ZePAD
from zepad_mm.selection import GRIDS, select_detector, select_fusion


@pytest.fixture
def labelled(zepad: ZePAD) -> LabelledImages:
    """Images labelled by the robust branches, so that they start with full accuracy."""
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = zepad.branch_logits(images)[:2].mean(0).argmax(-1)
    return LabelledImages(images, labels, CLASSES, "random")


def test_grids_cover_every_rule() -> None:
    assert set(GRIDS) == set(RULES)


def test_select_fusion_takes_the_most_accurate_robust_candidate(
    zepad: ZePAD, labelled: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "GRIDS", {"equal": {}, "bounded_benign": {"benign_weight": (0.0, 0.4)}})
    result = select_fusion(zepad, labelled, epsilon=2 / 255, steps=3, tolerance=0.0)
    assert (zepad.config.fusion, zepad.config.fusion_params) == (result.chosen.rule, result.chosen.params)
    assert len(result.tried) == 3
    assert all(candidate.pool <= candidate.clean for candidate in result.tried)
    assert all(candidate.shared <= candidate.pool for candidate in result.tried)
    assert result.chosen.attacked
    floor = max(result.branches[name]["shared"] for name in ("full", "lora"))
    robust_enough = [c for c in result.tried if c.shared >= floor]
    if robust_enough:
        assert result.chosen.clean == max(c.clean for c in robust_enough)
    else:
        assert result.chosen.shared == max(c.shared for c in result.tried if c.attacked)
    assert result.to_dict()["n"] == 24


def test_select_fusion_rejects_a_model_without_robust_branch(
    zepad: ZePAD, labelled: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ZePAD, "benign", property(lambda self: (True, True, True)))
    with pytest.raises(ValueError, match="no robust branch"):
        select_fusion(zepad, labelled)


def test_select_detector_keeps_its_false_positive_rate(clip_source: str, labelled: LabelledImages) -> None:
    model = make_zepad(clip_source)
    detected = select_detector(model, labelled, 1 - labelled.images, false_positive_rate=0.1)
    assert model.config.detector.score == max(detected, key=lambda name: detected[name])
    decision = model.decide(labelled.images)
    assert model.is_adversarial(decision).float().mean() <= 0.1


@pytest.mark.parametrize(
    ("robust_class", "sets", "expected"),
    [(0, 2, 0.5), (1, 2, 0.6), (1, 1, 1.0)],  # p = .79 of the benign branch loses against a sure robust one below .6
)
def test_cap_of_zero_sacrifice_is_the_lowest_that_costs_no_set_accuracy(
    robust_class: int, sets: int, expected: float, clip_source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_gated_zepad(clip_source)
    outputs = torch.zeros(4, 6, 3)
    outputs[:2, :, robust_class], outputs[2, :, 0], outputs[3] = 20.0, 2.0, -50.0  # the gate sees no attack
    monkeypatch.setattr(ZePAD, "branch_logits", lambda self, images: outputs)
    data = LabelledImages(torch.zeros(6, 3, 32, 32), torch.zeros(6).long(), CLASSES, "made up")
    assert selection._harmless_cap(model, [data] * sets) == expected
    assert model.class_names == CLASSES
