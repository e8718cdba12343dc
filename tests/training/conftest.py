"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch


@pytest.fixture
def timm_source(tmp_path: Path) -> str:
    """A timm model with weights in a local folder, as a public one would be on the Hub."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=0)
    timm.models.save_for_hf(model, tmp_path / "base", model_config={"num_classes": 0}, safe_serialization=True)
    return f"timm:local-dir:{tmp_path / 'base'}"
