"""Patch tokens and feature maps of encoders of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.encoder_zoo import SIDE, ZOO
from zepad_mm.encoders import Encoder, Preprocess, load_encoder
from zepad_mm.encoders.spatial import SpatialFeatures


@pytest.mark.parametrize("name", list(ZOO))
def test_every_encoder_has_spatial_features(name: str, tmp_path: Path) -> None:
    encoder = load_encoder(ZOO[name](tmp_path).source)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = SpatialFeatures(encoder)(images)
    assert tokens.ndim == 3
    assert tokens.shape[0] > 1
    assert tokens.shape[1] == 2
    (gradient,) = torch.autograd.grad(tokens.square().sum(), images)
    assert gradient.flatten(1).any(1).all()


def test_encoder_without_positions_is_refused() -> None:
    preprocess = Preprocess(image_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), preprocess, 5, "toy:flat")
    with pytest.raises(ValueError, match="toy:flat: no module has patch tokens"):
        SpatialFeatures(encoder)
