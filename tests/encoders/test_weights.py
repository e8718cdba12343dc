"""Weights of every kind: in half precision, in several files, of networks that are not square, damaged, or missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes import defend as defend_recipe
from recipes import tune as tune_recipe
from tests.helpers.encoder_zoo import PATCHES, ZOO
from zepad_mm.cli import main
from zepad_mm.defend import defend
from zepad_mm.encoders import load_clip, load_encoder

KINDS = {
    "open_clip": ("open_clip: ViT, MultiheadAttention", "open_clip_model.safetensors"),
    "hf": ("hf: ViT", "model.safetensors"),
    "timm": ("timm: ResNet", "model.safetensors"),
    "ssl": ("ssl: ResNet of solo-learn, 3x3 stem", "a.ckpt"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def change_weights(path: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Replace each tensor of a file of weights."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        save_file({name: change(name, tensor) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        return
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {name: change(name, tensor) for name, tensor in content["state_dict"].items()}
    torch.save(content, path)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_answer_in_single(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    name, file = KINDS[kind]
    source = ZOO[name](tmp_path).source
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_encoder(source)(images)
        change_weights(tmp_path / file, lambda _, tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        encoder = load_encoder(source)
        features = encoder(images)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert features.dtype == torch.float32
    assert float((features - expected).abs().max()) < 0.05 * float(expected.abs().max())
    assert not torch.equal(features, expected)


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_base_weights_that_are_not_finite_are_refused_by_name(kind: str, value: float, tmp_path: Path) -> None:
    name, file = KINDS[kind]
    source = ZOO[name](tmp_path).source
    encoder = load_encoder(source)
    broken = [name.rpartition("backbone.")[2] for name, _ in encoder.named_parameters()][-1]
    ending = ".".join(broken.split(".")[-3:])

    def spoil(name: str, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, value) if name.endswith(ending) else tensor

    change_weights(tmp_path / file, spoil)
    with pytest.raises(ValueError, match=rf"has NaN or infinity in .*{ending}"):
        load_encoder(source)


def test_a_model_in_several_files_answers_as_in_one(tmp_path: Path) -> None:
    made = ZOO["hf: ViT"](tmp_path / "one")
    hf.AutoModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="20KB")
    (tmp_path / "many" / "preprocessor_config.json").write_bytes(
        (tmp_path / "one" / "preprocessor_config.json").read_bytes()
    )
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 1
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    source = f"hf:local-dir:{tmp_path / 'many'}"
    torch.testing.assert_close(load_encoder(source)(images), load_encoder(made.source)(images))
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shards[-1].name}, not all of it"):
        load_encoder(source)
    index = tmp_path / "many" / "model.safetensors.index.json"
    for wrong in ({"weight_map": {"a": "../outside.safetensors"}}, {"weight_map": []}, []):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"index\.json: (weight_map: )?expected"):
            load_encoder(source)


def wide_open_clip(folder: Path) -> str:
    made = ZOO["open_clip: ViT, MultiheadAttention"](folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = [32, 64]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    change_weights(
        folder / "open_clip_model.safetensors",
        lambda name, t: torch.cat([t, t[1:]]) if name == "visual.positional_embedding" else t,
    )
    return made.source


def wide_hf(folder: Path) -> str:
    hf.ViTModel(hf.ViTConfig(**{**PATCHES, "image_size": [32, 64]})).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 64}).save_pretrained(folder)
    return f"hf:local-dir:{folder}"


def wide_timm(folder: Path) -> str:
    sizes: dict[str, Any] = {"img_size": (32, 64), "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    overlay = {"input_size": (3, 32, 64)}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, pretrained_cfg_overlay=overlay, **sizes)
    timm.models.save_for_hf(model, str(folder), model_args=sizes, safe_serialization=True)
    return f"timm:local-dir:{folder}"


@pytest.mark.parametrize("make", [wide_open_clip, wide_hf, wide_timm])
def test_networks_for_images_that_are_not_square_are_refused(make: Callable[[Path], str], tmp_path: Path) -> None:
    source = make(tmp_path)
    with pytest.raises(ValueError, match="32 x 64 pixels; only square ones are supported"):
        load_encoder(source)


RANDOM = "open_clip:ViT-B-32"


def test_random_weights_are_refused_on_every_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--source", RANDOM, "--out", str(tmp_path / "out")]
    paths: list[Callable[[], object]] = [
        lambda: load_encoder(RANDOM),
        lambda: load_clip(RANDOM),
        lambda: defend(RANDOM, out=tmp_path / "out"),
        lambda: defend("open_clip:embedded", robust=[RANDOM]),
        lambda: tune_recipe.main(tune_recipe.Recipe.from_cli(settings)),
        lambda: defend_recipe.main(defend_recipe.Recipe.from_cli(settings)),
    ]
    for path in paths:
        with pytest.raises(ValueError, match="names no weights, so it would be random"):
            path()
    for command in (["defend", RANDOM], ["attack", RANDOM], ["evaluate", RANDOM]):
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        assert "names no weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_kinds_without_published_weights_are_refused(tmp_path: Path) -> None:
    unpublished = next(name for name in timm.list_models("*_tiny*") if not timm.get_pretrained_cfg(name).has_weights)
    with pytest.raises((ValueError, FileNotFoundError), match="weights"):
        load_encoder(f"timm:{unpublished}")
    for kind in ("open_clip", "hf", "timm"):
        name, file = KINDS[kind]
        source = ZOO[name](tmp_path / kind).source
        (tmp_path / kind / file).unlink()
        with pytest.raises(FileNotFoundError, match="holds no weights"):
            load_encoder(source)
        load_encoder(source, pretrained=False)
