"""Atomic files of JSON and tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import read_json, read_tensors, write_json, write_tensors


def test_replacing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def killed() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed here")

    with pytest.raises(RuntimeError):
        killed()
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


def test_write_tensors_accepts_shared_memory(tmp_path: Path) -> None:
    row = torch.arange(4.0)
    write_tensors(tmp_path / "a.safetensors", {"row": row, "same": row, "slice": row[1:3]})
    read, _ = read_tensors(tmp_path / "a.safetensors")
    assert {key: tensor.tolist() for key, tensor in read.items()} == {
        "row": [0, 1, 2, 3],
        "same": [0, 1, 2, 3],
        "slice": [1, 2],
    }
