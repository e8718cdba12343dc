"""Models that try to run code: nothing of theirs is executed, and nobody is asked on standard input."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zepad_mm
from tests.helpers.encoder_zoo import ZOO
from tests.helpers.hub_server import reached_through, running_hub
from zepad_mm.encoders import is_clip, load_clip, load_encoder
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.heads import HEADS
from zepad_mm.models.zepad import ZePAD, ZePADConfig

CODE = """\
from pathlib import Path
Path({marker!r}).write_text("executed")
from transformers import AutoConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Model, PreTrainedConfig
class Planted(CLIPTokenizer): pass
class PlantedConfig(PreTrainedConfig): model_type = "planted"
class PlantedModel(Dinov2Model): pass
class PlantedProcessor(CLIPImageProcessor): pass
"""
AUTO_MAP = {
    "AutoConfig": "planted.PlantedConfig",
    "AutoModel": "planted.PlantedModel",
    "AutoImageProcessor": "planted.PlantedProcessor",
    "AutoFeatureExtractor": "planted.PlantedProcessor",
    "AutoTokenizer": ["planted.Planted", "planted.Planted"],
}


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that planted code writes; reading standard input fails the test."""

    def ask(*prompt: object) -> str:
        raise AssertionError(f"asked on standard input: {prompt}")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def edit(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place; an absent one begins empty."""
    path = folder / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    change(values)
    path.write_text(json.dumps(values))


def plant(folder: Path, marker: Path, prefix: str = "") -> None:
    """Put code into the folder and name it in every configuration there is."""
    (folder / "planted.py").write_text(CODE.format(marker=str(marker)))
    mapped = {
        name: prefix + to if isinstance(to, str) else [prefix + part for part in to] for name, to in AUTO_MAP.items()
    }
    for file in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "processor_config.json"):
        if (folder / file).is_file() or file == "tokenizer_config.json":
            edit(folder, file, lambda values: values.update(auto_map=mapped, trust_remote_code=True))
    edit(folder, "tokenizer_config.json", lambda values: values.update(tokenizer_class="Planted"))


def loads(source: str) -> list[Callable[[], object]]:
    """Every way in which a base encoder is loaded."""
    clip = not source.startswith("timm") and "dinov2" not in source
    return [lambda: load_encoder(source), lambda: load_encoder(source, pretrained=False)] + (
        [lambda: load_clip(source), lambda: load_clip(source, pretrained=False), lambda: is_clip(source)]
        if clip
        else []
    )


def attempt(load: Callable[[], object]) -> Exception | None:
    """The error of a load, which must be one of those that name the fault; None where it loads without the code."""
    try:
        load()
    except (ValueError, OSError) as error:
        return error
    return None


def open_clip_with_tokenizer(folder: Path) -> str:
    """An open_clip folder whose tokenizer is transformers', with a request for its code."""
    made = ZOO["open_clip: ModifiedResNet"](folder)
    arguments = {"trust_remote_code": True}
    edit(
        folder,
        "open_clip_config.json",
        lambda values: values["model_cfg"]["text_cfg"].update(hf_tokenizer_name="me/x", tokenizer_kwargs=arguments),
    )
    return made.source


@pytest.mark.parametrize("name", ["open_clip", "hf: CLIP", "hf: DINOv2", "timm: ResNet"])
@pytest.mark.parametrize("prefix", ["", "acme/code--"])
def test_planted_code_is_not_executed(name: str, prefix: str, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / ("dinov2" if "DINO" in name else "clip")
    source = open_clip_with_tokenizer(folder) if name == "open_clip" else ZOO[name](folder).source
    plant(folder, marker, prefix)
    for load in loads(source):
        attempt(load)
        assert not marker.exists()
    edit(folder, "config.json", lambda values: values.update(model_type="planted", architecture="planted"))
    for load in loads(source):
        error = attempt(load)
        assert name == "open_clip" or error is not None


REQUESTS = {  # file -> path of keys -> value: what libraries would act on
    "hf: CLIP": [
        ("tokenizer_config.json", ("tokenizer_class",), "../planted"),
        ("config.json", ("vision_config", "auto_map"), AUTO_MAP),
        ("config.json", ("attn_implementation",), "acme/kernel"),
        ("config.json", ("_attn_implementation",), "acme/kernel"),
        ("config.json", ("quantization_config",), {"quant_method": "planted"}),
        ("config.json", ("transformers_weights",), "../other.safetensors"),
        ("config.json", ("architectures",), ["pipeline"]),
        ("adapter_config.json", ("base_model_name_or_path",), "acme/other"),
    ],
    "open_clip: ViT, MultiheadAttention": [
        ("open_clip_config.json", ("model_cfg", "text_cfg", "hf_model_name"), "acme/other"),
        ("open_clip_config.json", ("model_cfg", "text_cfg", "tokenizer_kwargs"), {"trust_remote_code": True}),
        ("open_clip_config.json", ("model_cfg", "text_cfg", "norm_kwargs"), {"device": "meta"}),
        ("open_clip_config.json", ("model_cfg", "vision_cfg", "timm_model_name"), "hf-hub:acme/other"),
        ("open_clip_config.json", ("model_cfg", "vision_cfg", "timm_model_name"), "local-dir:/tmp"),
        ("open_clip_config.json", ("model_cfg", "cast_dtype"), "x"),
    ],
    "timm: ResNet": [
        ("config.json", ("model_args", "checkpoint_path"), "planted.pth"),
        ("config.json", ("model_args", "pretrained_cfg_overlay"), {"file": "planted.pth"}),
        ("config.json", ("model_args", "block"), {"a": 1}),
        ("config.json", ("architecture",), "hf-hub:acme/other"),
        ("config.json", ("pretrained_cfg", "custom_load"), "hf"),
        ("config.json", ("pretrained_cfg", "url"), "http://127.0.0.1:9/x"),
        ("config.json", ("pretrained_cfg", "file"), "planted.pth"),
    ],
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_for_other_code_or_files_are_refused_or_ignored(name: str, tmp_path: Path, marker: Path) -> None:
    source = ZOO[name](tmp_path / "clip").source
    images = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    expected = load_encoder(source)(images)
    for file, keys, value in REQUESTS[name]:
        folder = tmp_path / "clip"
        kept = (folder / file).read_bytes() if (folder / file).is_file() else None

        def put(values: dict[str, Any], keys: tuple[str, ...] = keys, value: Any = value) -> None:
            for key in keys[:-1]:
                values = values.setdefault(key, {})
            values[keys[-1]] = value

        edit(folder, file, put)
        error = attempt(lambda: load_clip(source)) if "timm" not in name else None
        if attempt(lambda: load_encoder(source)) is None:
            assert torch.equal(load_encoder(source)(images), expected), keys
        else:
            assert error is None or keys[-1] in str(error) or "tokenizer" in str(error), (keys, error)
        (folder / file).unlink() if kept is None else (folder / file).write_bytes(kept)


def test_every_auto_class_is_told_not_to_trust_remote_code() -> None:
    """Without it transformers asks on standard input; with it in a dictionary of somebody else it may be True."""
    seen = set()
    for path in Path(zepad_mm.__file__).parent.rglob("*.py"):
        text = path.read_text()
        calls = ast.walk(ast.parse(text)) if "Auto" in text or "get_tokenizer" in text else ()
        for node in calls:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, method = ast.unparse(node.func.value), node.func.attr
            if (owner.startswith("Auto") and method.startswith("from_")) or method == "get_tokenizer":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if not keywords and method == "get_tokenizer":  # of open_clip's own, which is no Auto class
                    continue
                assert keywords.get("trust_remote_code") == "False", f"{path.name}: {ast.unparse(node)}"
                assert None not in keywords, f"{path.name}: {ast.unparse(node)} passes on unknown arguments"
                seen.add(owner)
    assert {"AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "open_clip"} <= seen


def test_planted_code_is_not_executed_from_the_hub(tmp_path: Path, marker: Path) -> None:
    """A defended model on the Hub, over a base whose tokenizer is code: of the base or of a third repository."""
    open_clip_with_tokenizer(tmp_path / "clip")
    clean = shutil.copytree(tmp_path / "clip", tmp_path / "clean")
    for key in ("tokenizer_kwargs", "hf_tokenizer_name"):
        edit(clean, "open_clip_config.json", lambda values, key=key: values["model_cfg"]["text_cfg"].pop(key))
    with running_hub() as hub, reached_through(hub, tmp_path / "cache"):
        hub.put("acme/base", clean)
        base = "open_clip:hf-hub:acme/base"
        encoder = load_encoder(base)
        branch = BranchConfig(name="one", role="benign", source=base, head="linear")
        config = ZePADConfig(public_source=base, branches=(branch,), class_names=("a", "b"))
        model = ZePAD(config, [Branch(branch, encoder, HEADS.get("linear")(encoder.feature_dim, 2))])
        model.save_pretrained(tmp_path / "model")
        for prefix in ("", "acme/code--"):
            plant(tmp_path / "clip", marker, prefix)
            hub.put("acme/base", tmp_path / "clip")
            hub.put("acme/code", tmp_path / "clip")
            edit(tmp_path / "model", "config.json", lambda values: values.update(revisions={}))
            loads_encoder, loads_without, loads_clip, *_ = loads(base)
            model_loads = [lambda: ZePAD.from_pretrained(tmp_path / "model")]
            for load in (loads_encoder, loads_without, loads_clip, *model_loads):
                assert "tokenizer_kwargs" in str(attempt(load)), prefix
            assert not marker.exists()
