"""Metrics against hand counts and published values."""

from __future__ import annotations

import pytest
import torch

from zepad_mm.evaluation.metrics import (
    auroc,
    detect,
    flipped_when_right,
    fooling_rate,
    paper_rule_accuracy,
    share,
    wilson,
)


def test_wilson_matches_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for count, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(count, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)
    for count, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="wilson"):
            wilson(count, n)


def test_fooling_rate_and_flipped_when_right() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    clean = torch.tensor([0, 1, 1, 1, 2])  # one wrong already
    attacked = torch.tensor([1, 2, 1, 0, 2])
    assert fooling_rate(clean, attacked) == pytest.approx(3 / 5)  # the wrong one that moved counts too
    assert flipped_when_right(clean, attacked, labels) == pytest.approx(2 / 4)
    assert flipped_when_right(torch.ones(2, dtype=torch.long), attacked[:2], torch.zeros(2, dtype=torch.long)) is None
    assert share(clean == labels).value == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="at least one sample"):
        share(torch.empty(0, dtype=torch.bool))


def test_detect_takes_thresholds_from_validation_scores() -> None:
    validation = torch.arange(100) / 100
    clean = torch.tensor([0.0, 0.5, 0.97, 0.99])  # test images: more false alarms than the thresholds promise
    attacked = torch.tensor([0.2, 0.96, 0.97, 2.0])
    found = detect(validation, clean, attacked)
    assert found.tpr_at_fpr1 == pytest.approx(1 / 4)
    assert found.fpr_at_fpr1 == pytest.approx(1 / 4)
    assert found.tpr_at_fpr5 == pytest.approx(3 / 4)
    assert found.fpr_at_fpr5 == pytest.approx(2 / 4)
    pairs = [(a > c) + 0.5 * (a == c) for a in attacked.tolist() for c in clean.tolist()]
    assert found.auroc == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(torch.zeros(3), torch.zeros(5)) == pytest.approx(0.5)
    assert auroc(torch.zeros(2), torch.tensor([torch.nan, torch.inf])) == pytest.approx(0.5)


def test_paper_rule_accuracy_weights_clean_and_attacked_equally() -> None:
    clean, attacked = torch.tensor([0.0, 0.2, -0.4, 0.1]), torch.tensor([0.3, 0.0])
    assert paper_rule_accuracy(clean, attacked) == pytest.approx((3 / 4 + 1 / 2) / 2)
