"""Folders of adversarial images: what load_adversarial refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zepad_mm.attacks.io import ADVERSARIAL_FILE, load_adversarial, save_adversarial


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adversarial(tmp_path, torch.full((2, 3, 4, 4), 51 / 255), torch.tensor([0, 1]))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0]}, "a label for each of the 2 images, got 1"),
        ({"labels": [0, -1]}, "a list of class indices"),
        ({"labels": [0, "1"]}, "a list of class indices"),
        ({"n": "2"}, "number of images"),
    ],
)
def test_load_adversarial_checks_counts_and_labels(change: dict[str, Any], message: str, folder: Path) -> None:
    path = folder / ADVERSARIAL_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_adversarial(folder)


def test_load_adversarial_opens_png_alone(folder: Path) -> None:
    (folder / "000001.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    with pytest.raises(ValueError, match=r"000001\.png could not be read as an image: expected one of the formats PNG"):
        load_adversarial(folder)
    (folder / "000001.png").unlink()
    with pytest.raises(FileNotFoundError, match="announces 2 images"):
        load_adversarial(folder)
