"""Small files that ask for far larger networks than their weights explain: refused before anything is built."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.encoder_zoo import ZOO
from zepad_mm.encoders import load_clip, load_encoder

IN_TIME = 30.0  # seconds, on a busy machine
OPEN_CLIP = "open_clip: ViT, MultiheadAttention"
CONFIGS: list[tuple[str, str, str, tuple[str, ...], Any]] = [  # kind, folder, file, path of keys, value
    (OPEN_CLIP, "clip", "open_clip_config.json", ("model_cfg", "text_cfg", "layers"), 10**7),
    (OPEN_CLIP, "clip", "open_clip_config.json", ("model_cfg", "text_cfg", "vocab_size"), 10**9),
    (OPEN_CLIP, "clip", "open_clip_config.json", ("model_cfg", "vision_cfg", "layers"), 10**7),
    (OPEN_CLIP, "clip", "open_clip_config.json", ("model_cfg", "vision_cfg", "width"), 2**20),
    ("hf: CLIP", "clip", "config.json", ("text_config", "num_hidden_layers"), 10**7),
    ("hf: CLIP", "clip", "config.json", ("vision_config", "intermediate_size"), 2**30),
    ("hf: DINOv2", "dinov2", "config.json", ("num_hidden_layers",), 10**7),
    ("timm: ViT", "timm", "config.json", ("model_args", "depth"), 10**7),
    ("timm: ViT", "timm", "config.json", ("model_args", "embed_dim"), 2**24),
]


def refused(source: str, message: str) -> None:
    started = time.monotonic()
    for load in (load_clip, load_encoder) if source.endswith("clip") else (load_encoder,):
        with pytest.raises(ValueError, match=message):
            load(source)
    assert time.monotonic() - started < IN_TIME


@pytest.mark.parametrize(
    ("kind", "folder", "file", "keys", "value"), CONFIGS, ids=[f"{c[0][:9]}-{c[3][-1]}-{c[4]}" for c in CONFIGS]
)
def test_configurations_larger_than_their_weights_are_refused(
    kind: str, folder: str, file: str, keys: tuple[str, ...], value: int, tmp_path: Path
) -> None:
    source = ZOO[kind](tmp_path / folder).source
    path = tmp_path / folder / file
    config = json.loads(path.read_text())
    inside = config
    for key in keys[:-1]:
        inside = inside.setdefault(key, {})
    inside[keys[-1]] = value
    path.write_text(json.dumps(config))
    refused(source, f"{keys[-1]}|far larger network|expected at most")


def test_checkpoints_that_claim_blocks_they_do_not_hold_are_refused(tmp_path: Path) -> None:
    source = ZOO["ssl: ViT of DINO"](tmp_path).source.partition("?")[0]
    tensors = torch.load(source.removeprefix("ssl:"), weights_only=True)
    while not any(isinstance(value, torch.Tensor) for value in tensors.values()):
        tensors = next(value for value in tensors.values() if isinstance(value, dict))
    first = next(name for name in tensors if name.endswith("blocks.0.attn.qkv.weight"))
    for number in (3_000_000, 10**40):
        claimed = {**tensors, first.replace(".0.", f".{number}."): tensors[first].clone()}
        save_file({name: tensor.contiguous() for name, tensor in claimed.items()}, tmp_path / "a.safetensors")
        refused(f"ssl:{tmp_path / 'a.safetensors'}", rf"blocks, one of them number {str(number)[:20]}, and no block")


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv.weight", "layer1.0.conv1.weight", "0.weight"])
def test_checkpoints_of_very_many_networks_are_refused(name: str, tmp_path: Path) -> None:
    """Each network costs a pass over all names: 30,000 in a file of 3 MB would take minutes."""
    tensors = {f"n{number}.{name}": torch.zeros(1, 3, 1, 1) for number in range(1_000)}
    tensors |= {f"n{number}.1.running_mean": torch.zeros(1) for number in range(1_000)} if name[0] == "0" else {}
    save_file(tensors, tmp_path / "a.safetensors")
    refused(f"ssl:{tmp_path / 'a.safetensors'}", "seems to hold 1000 networks, .*expected at most 50")
