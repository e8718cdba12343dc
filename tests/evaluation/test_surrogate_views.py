"""Attacks on other prompts, on patch tokens and by labels alone, on the embedded model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers.models import make_gated_zepad
from zepad_mm.data import LabelledImages
from zepad_mm.evaluation import PRESETS, EvalData, Report, evaluate


@pytest.fixture(scope="module")
def report() -> Report:
    settings = replace(
        PRESETS.get("smoke"),
        threats=("T2",),
        n=8,
        rules=("rfdm",),
        own_attacks=("prompts", "patch_tokens", "rays"),
        pools=(),
        adaptive=("mora",),
        steps=3,
        square_queries=20,
        image_size=64,
        corruptions=(),
    )
    return evaluate("embedded", settings=settings)


def test_attacks_take_the_rows_that_they_are_for(report: Report) -> None:
    ran = {row["attack"] for row in report.rows if row["threat"] == "T2"}
    branches = [name for name in report.models if name.startswith("branch:")]
    assert ran == {"prompts@zepad", "rays@zepad", "mora@zepad", "worst", *(f"patch_tokens@{b}:own" for b in branches)}


def test_patch_tokens_break_the_benign_branch(report: Report) -> None:
    clean = report.accuracy("branch:benign")
    own = report.row("branch:benign", "T2", "patch_tokens@branch:benign:own")
    assert own["attacked"] > 0
    assert own["accuracy"] < clean


def test_gated_model_says_which_attacks_its_gate_was_trained_on(clip_source: str) -> None:
    model = make_gated_zepad(clip_source)
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names = model.class_names
    photos = LabelledImages(images, torch.arange(12) % len(names), names, "noise")
    settings = replace(
        PRESETS.get("smoke"),
        threats=("T1", "T1i", "T2"),
        n=None,
        universal=("feature_uap", "uapgd"),
        universal_steps={"feature_uap": 2, "uapgd": 1},
        rules=("rfdm",),
        own_attacks=("pgd", "prompts"),
        pools=(),
        adaptive=("mora",),
        superclasses=tuple(range(len(names))),
        corruptions=(),
    )
    report = evaluate(model, data=EvalData(photos, photos, photos), settings=settings)
    seen = {row["algorithm"]: row["seen"] for row in report.rows if row.get("seen") is not None}
    assert seen == {name: name == "feature_uap" for name in seen}
    assert {"feature_uap", "uapgd", "mi", "mora"} <= set(seen)
    assert "trained on: `feature_uap`; held out from its training: `uapgd`." in report.markdown()
