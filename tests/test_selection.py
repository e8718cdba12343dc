"""The fusion rule and the detector are chosen on validation pictures, by attack."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.models import CLASSES, make_zepad
from zepad_mm import selection
from zepad_mm.data import LabelledImages
from zepad_mm.models.fusion import RULES
from zepad_mm.models.zepad import ZePAD
from zepad_mm.selection import GRIDS, select_detector, select_fusion


@pytest.fixture
def labelled(zepad: ZePAD) -> LabelledImages:
    """Pictures labelled by what the robust branches say, so that there is accuracy to lose."""
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = zepad.branch_logits(images)[:2].mean(0).argmax(-1)
    return LabelledImages(images, labels, CLASSES, "random")


def test_every_rule_has_a_grid() -> None:
    assert set(GRIDS) == set(RULES)


def test_the_choice_follows_from_what_was_measured(
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
    holding = [c for c in result.tried if c.shared >= floor]
    if holding:  # the most accurate that holds was attacked before it was taken
        assert result.chosen.clean == max(c.clean for c in holding)
    else:
        assert result.chosen.shared == max(c.shared for c in result.tried if c.attacked)
    assert result.to_dict()["n"] == 24


def test_a_model_without_robust_branch_has_nothing_to_keep(
    zepad: ZePAD, labelled: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ZePAD, "benign", property(lambda self: (True, True, True)))
    with pytest.raises(ValueError, match="no robust branch"):
        select_fusion(zepad, labelled)


def test_the_detector_keeps_its_rate_on_validation(clip_source: str, labelled: LabelledImages) -> None:
    model = make_zepad(clip_source)
    caught = select_detector(model, labelled, 1 - labelled.images, false_positive_rate=0.1)
    assert model.config.detector.score == max(caught, key=lambda name: caught[name])
    decision = model.decide(labelled.images)
    assert model.is_adversarial(decision).float().mean() <= 0.1
