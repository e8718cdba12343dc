"""Attacks on other prompts, on patch tokens and by labels alone, on the embedded model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zepad_mm.evaluation import PRESETS, Report, evaluate


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
