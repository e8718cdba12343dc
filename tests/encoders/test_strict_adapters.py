"""Adapters load whole and fold exactly, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

from tests.helpers.models import make_zepad, write_clip
from zepad_mm.encoders import LoraSettings, add_lora, folded_lora, load_encoder, load_lora, merge_lora
from zepad_mm.models.zepad import ZePAD
from zepad_mm.training.artifacts import write_tuned

SOURCE = "open_clip:embedded?image_size=64"
A = "base_model.model.head.proj.lora_A.weight"


def write_adapter(folder: Path, **options: Any) -> Path:
    model = get_peft_model(
        load_encoder(SOURCE).backbone,
        LoraConfig(r=2, lora_alpha=4, target_modules=["proj"], init_lora_weights=False, **options),
    )
    for name, parameter in model.named_parameters():
        parameter.data += 0.3 * ("magnitude" in name or name.endswith("lora_B.default.bias"))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"use_rslora": True},
        {"rank_pattern": {"head.proj": 3}, "alpha_pattern": {"head.proj": 7}},
    ],
)
def test_load_lora_folds_and_merges_every_kind_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    encoder = load_lora(load_encoder(SOURCE), write_adapter(tmp_path, **options))
    with torch.no_grad():
        plain = encoder(images)
        with folded_lora(encoder):
            torch.testing.assert_close(encoder(images), plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(encoder(images), plain)
        torch.testing.assert_close(merge_lora(encoder)(images), plain, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain, load_encoder(SOURCE)(images), atol=1e-2)


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "extra key": (lambda t: t.update(other=torch.zeros(1)), "unknown other"),
    "missing key": (lambda t: t.pop(A), "lacks"),
    "no keys": (lambda t: t.clear(), "lacks|rank"),
    "NaN": (lambda t: t[A].fill_(float("nan")), "NaN or infinity"),
    "infinity": (lambda t: t[A].fill_(float("inf")), "NaN or infinity"),
    "integers": (lambda t: t.update({A: t[A].int()}), "torch.int32"),
    "complex": (lambda t: t.update({A: t[A].to(torch.complex64)}), "complex64"),
    "fp8": (lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)}), "float8"),
    "shape": (lambda t: t.update({A: t[A][:1].clone()}), "instead of|rank"),
}


@pytest.mark.parametrize("change", TENSORS)
def test_load_lora_refuses_other_tensors(change: str, tmp_path: Path) -> None:
    edit, message = TENSORS[change]
    tensors = load_file(write_adapter(tmp_path) / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_lora(load_encoder(SOURCE), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank_pattern", {".*": 10**8}),
        ("r", 10**400),
        ("r", -1),
        ("target_modules", "(a+)+$"),
        ("target_modules", "("),
        ("target_modules", ["proj"] * 300_000),
        ("rank_pattern", {f"layer{number}": 2 for number in range(300_000)}),
        ("lora_alpha", "x"),
        ("peft_type", "ADALORA"),
        ("megatron_core", "os"),
        ("modules_to_save", ["head"]),
        ("init_lora_weights", "pissa"),
        ("base_model_name_or_path", "open_clip:ViT-B-32/openai"),
    ],
)
def test_load_lora_refuses_other_configurations(key: str, value: Any, tmp_path: Path) -> None:
    path = write_adapter(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"{key}|trained on"):
        load_lora(load_encoder(SOURCE), tmp_path)


@pytest.mark.parametrize(
    ("source", "base", "fits"),
    [
        ("hf:google/vit-base", "google/vit-base", True),
        ("hf:google/vit-base@main", "google/vit-base", True),
        ("hf:google/vit-base", "google/vit-base-in21k", False),
        ("open_clip:hf-hub:laion/clip", "laion/other", False),
        ("open_clip:embedded", "laion/other", True),  # no repository: may be a copy
        ("hf:local-dir:models/vit", "google/vit-base", True),
        ("hf:google/vit-base", "hf:google/vit-large", False),
    ],
)
def test_load_lora_compares_repositories_as_peft_writes_them(
    source: str, base: str, fits: bool, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    encoder = load_encoder(SOURCE)
    encoder.source = source
    with nullcontext() if fits else pytest.raises(ValueError, match="was trained on"):
        load_lora(encoder, tmp_path)


def test_load_lora_leaves_the_random_state(tmp_path: Path) -> None:
    encoder, folder = load_encoder(SOURCE), write_adapter(tmp_path)
    state = torch.get_rng_state()
    load_lora(encoder, folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_load_lora_refuses_a_second_adapter(tmp_path: Path) -> None:
    encoder = load_lora(load_encoder(SOURCE), write_adapter(tmp_path))
    with pytest.raises(ValueError, match="has a LoRA adapter already"):
        load_lora(encoder, tmp_path)


def _second_in_use(backbone: Any) -> None:
    backbone.add_adapter("second", LoraConfig(r=2, target_modules=["c_fc"]))
    backbone.set_adapter("second")


def _renamed(backbone: Any) -> None:
    _second_in_use(backbone)
    backbone.delete_adapter("default")


@pytest.mark.parametrize(
    "change",
    [_second_in_use, _renamed, lambda backbone: backbone.disable_adapter_layers()],
    ids=["second", "renamed", "off"],  # names of functions differ between workers
)
def test_saving_refuses_adapters_that_would_not_load_as_they_are_used(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model = make_zepad(write_clip(tmp_path))
    encoder = model.branch("lora").encoder
    model.save_pretrained(tmp_path / "model")
    change(encoder.backbone)
    with pytest.raises(ValueError, match="only one named default that is in use can be saved"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="only one named default that is in use can be saved"):
        write_tuned(tmp_path / "tuned", encoder, {})
    ZePAD.from_pretrained(tmp_path / "model")  # the old one is whole


@pytest.mark.parametrize("branch", ["full", "benign"])
def test_saving_refuses_an_undeclared_adapter(branch: str, tmp_path: Path) -> None:
    model = make_zepad(write_clip(tmp_path))
    add_lora(model.branch(branch).encoder, LoraSettings(rank=2))
    with pytest.raises(ValueError, match="but its encoder has an adapter"):
        model.save_pretrained(tmp_path / "model")


def test_saving_unwraps_averaged_weights_and_refuses_parametrized_ones(tmp_path: Path) -> None:
    model = make_zepad(write_clip(tmp_path))
    encoder = model.branch("full").encoder
    encoder.backbone = AveragedModel(encoder.backbone)
    model.save_pretrained(tmp_path / "model")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ZePAD.from_pretrained(tmp_path / "model")(images), model(images))
    weight_norm(encoder.backbone.module.conv1)
    with pytest.raises(ValueError, match="is parametrized"):
        model.save_pretrained(tmp_path / "model")


def test_lora_settings_refuse_a_string_of_targets() -> None:
    with pytest.raises(ValueError, match="expected a list of names"):
        LoraSettings(targets="all-linear")  # type: ignore[arg-type]
