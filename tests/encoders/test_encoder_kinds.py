"""Encoders of every kind match their own library and can be attacked, adapted, saved and used for a task."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tests.helpers import encoder_zoo as zoo
from tests.helpers.encoder_checks import check, smooth_images
from tests.helpers.models import make_zepad, write_clip
from zepad_mm.data import LabelledImages
from zepad_mm.encoders import (
    BACKENDS,
    Encoder,
    Fingerprint,
    LoraSettings,
    Preprocess,
    add_lora,
    count_parameters,
    differences,
    is_clip,
    load_clip,
    load_encoder,
    optimize_for_inference,
    set_gradient_checkpointing,
)
from zepad_mm.encoders.fingerprint import fingerprint
from zepad_mm.encoders.huggingface_preprocess import preprocess_of
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import ZePAD
from zepad_mm.training.artifacts import load_tuned, write_tuned
from zepad_mm.training.student import build_student

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_encoder_kind_passes_every_check(name: str, tmp_path: Path) -> None:
    row = check(name, zoo.ZOO[name](tmp_path / "model"), tmp_path / "out")
    assert row.lora_layers >= 10
    assert row.feature_dim >= 16


def test_zoo_has_a_model_of_every_registered_kind() -> None:
    assert {name.partition(":")[0] for name in zoo.ZOO} == set(BACKENDS)


def test_encoder_table_covers_every_kind() -> None:
    rows = json.loads((ROOT / "results" / "encoders.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(zoo.ZOO)
    assert len(rows) >= 12
    assert all(value not in (None, "") for row in rows for value in row.values())
    text = (ROOT / "results" / "encoders.md").read_text()
    assert all(f"| {name} |" in text for name in zoo.ZOO)


def test_mae_encoder_is_deterministic(tmp_path: Path) -> None:
    encoder = load_encoder(zoo.ZOO["hf: ViT-MAE"](tmp_path).source)
    images = smooth_images(32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder(images))


def test_missing_pooler_is_logged_and_not_random(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = zoo.ZOO["hf: ViT classifier, no pooler"](tmp_path).source
    encoder = load_encoder(source)
    assert "no weights for pooler.dense.bias, pooler.dense.weight" in caplog.text
    assert "left out classifier (2)" in caplog.text
    assert [*encoder.state_dict()] == [*load_encoder(source, pretrained=False).state_dict()]


def test_siglip_logit_bias_is_kept(tmp_path: Path) -> None:
    """Probabilities of its sigmoid need the bias, the softmax of a zero-shot head does not."""
    _, text = load_clip(zoo.ZOO["open_clip: SigLIP style"](tmp_path).source)
    assert text.logit_bias == -10.0
    assert not any("visual" in name for name, _ in text.named_parameters())


def test_load_clip_towers_share_no_weights(tmp_path: Path) -> None:
    source = zoo.ZOO["hf: CLIP"](tmp_path).source
    encoder, text = load_clip(source)
    ours, theirs = ({id(p) for p in part.parameters()} for part in (encoder, text))
    assert not ours & theirs
    assert {name.split(".")[2] for name, _ in encoder.named_parameters()} == {"vision_model", "visual_projection"}
    assert [*encoder.state_dict()] == [*load_encoder(source).state_dict()]
    assert is_clip(source)


def test_zepad_over_a_transformers_clip(tmp_path: Path) -> None:
    """Zero-shot heads, other classes without training, the undefended model, and a student to be tuned."""
    source = zoo.ZOO["hf: SigLIP"](tmp_path / "clip").source
    make_zepad(source).save_pretrained(tmp_path / "zepad")
    model = ZePAD.from_pretrained(tmp_path / "zepad")
    images, names = smooth_images(32, 32), ("cat", "dog", "ball", "tree")
    assert model.set_classes(names, "single").decide(images).logits.shape == (2, 4)
    encoder, text = load_clip(source)
    with torch.no_grad():
        expected = zero_shot_head(text, names, "single")(encoder(images))
        torch.testing.assert_close(model.undefended(images), expected)
    data = LabelledImages(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]), names, "random")
    assert type(build_student(source, data).head).__name__ == "ZeroShotHead"
    vit = zoo.ZOO["hf: ViT"](tmp_path / "vit").source
    assert type(build_student(vit, data).head).__name__ == "MLPHead"


def test_huggingface_sources_name_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = zoo.ZOO["hf: ViT"](tmp_path / "vit").source
    with pytest.raises(ValueError, match=r"need a CLIP: .* ViTModel, which has no text tower"):
        load_clip(source)
    for bad, message in (("hf:a/b/c", "hf:ORG/NAME@REVISION"), ("hf:org/name@", "hf:ORG/NAME@REVISION")):
        with pytest.raises(ValueError, match=message):
            load_encoder(bad)
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json does not exist"):
        load_encoder("hf:local-dir:/nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = r"no-such/model at revision 'v2' is not.*in the cache, and HF_HUB_OFFLINE=1"
    with pytest.raises(FileNotFoundError, match=offline):
        load_encoder("hf:no-such/model@v2")
    shutil.copytree(tmp_path / "vit", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"its weights cannot be read"):
        load_encoder(f"hf:local-dir:{tmp_path / 'cut'}")
    shutil.copytree(tmp_path / "vit", tmp_path / "deeper")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "deeper" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lacks layers\.3\."):
        load_encoder(f"hf:local-dir:{tmp_path / 'deeper'}")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="its image processor"):
        load_encoder(source)


def test_unsupported_processor_step_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """LeViT enlarges by a rule of its own; SigLIP in tall boxes is refused; a Lanczos filter has no gradient."""
    config = transformers.ViTConfig(image_size=32)
    preprocess_of(transformers.LevitImageProcessor(size={"shortest_edge": 32}, crop_size=32), config, "hf:levit")
    assert "hf:levit: our preprocessing and LevitImageProcessor differ" in caplog.text
    with pytest.raises(ValueError, match="32 x 16 pixels; only square"):
        preprocess_of(transformers.ViTImageProcessor(size={"height": 32, "width": 16}), config, "hf:tall")
    preprocess_of(transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=1), config, "hf:lanczos")
    assert "hf:lanczos resizes with PIL's filter 1" in caplog.text
    raw = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, rescale_factor=1.0, do_normalize=False)
    assert preprocess_of(raw, config, "hf:raw").std == (1 / 255,) * 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("interpolation", "lanczos", "interpolation"),
        ("centre", "left", "centre"),
        ("std", (0.5, 0.0, 0.5), "std above 0"),
        ("mean", (0.5,), "three numbers"),
        ("resize_size", 20, "at least the image_size of 32"),
    ],
)
def test_preprocess_rejects_impossible_values(field: str, value: object, message: str) -> None:
    good = {"image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match=message):
        Preprocess(**{**good, field: value})


def test_lora_targets_skip_layers_that_are_not_called() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.past = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.called(pixels.mean((2, 3))), self.past.weight)

    def encoder() -> Encoder:
        return Encoder(Past(), Preprocess(image_size=8, mean=(0, 0, 0), std=(1, 1, 1)), 4, "test:past")

    adapted = add_lora(encoder(), LoraSettings(rank=2))
    assert adapted.backbone.peft_config["default"].target_modules == {"called"}
    assert str(count_parameters(adapted)) == "14 of 50 parameters train (28.00%)"
    with pytest.raises(ValueError, match=r"test:past reads the weights of base_model.model.past"):
        add_lora(encoder(), LoraSettings(rank=2, targets=("past",)))
    with pytest.raises(ValueError, match="Past has no gradient checkpointing"):
        set_gradient_checkpointing(encoder())


@pytest.mark.parametrize("name", ["hf: SigLIP", "hf: ResNet", "timm: ResNet", "open_clip: ModifiedResNet"])
def test_optimize_for_inference_keeps_outputs_of_every_kind(name: str, tmp_path: Path) -> None:
    encoder = load_encoder(zoo.ZOO[name](tmp_path).source)
    images = smooth_images(40, 36)
    with torch.no_grad():
        torch.testing.assert_close(optimize_for_inference(encoder, 40)(images), encoder(images), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip: ModifiedResNet", "of ModifiedResNet recomputes nothing"),
        ("open_clip: ViT, fused in_proj, q/k norm", "does not run"),
        ("hf: ResNet", "ResNetModel has no gradient checkpointing"),
    ],
)
def test_gradient_checkpointing_rejects_unsupported_networks(name: str, message: str, tmp_path: Path) -> None:
    encoder = load_encoder(zoo.ZOO[name](tmp_path).source)
    with pytest.raises(ValueError, match=message):
        set_gradient_checkpointing(encoder)
    with torch.no_grad():
        assert encoder(smooth_images(32, 32)).shape == (2, encoder.feature_dim)


def test_gradient_checkpointing_can_be_switched_off(tmp_path: Path) -> None:
    encoder = load_encoder(zoo.ZOO["timm: ResNet"](tmp_path).source)
    before, state = {k: v.clone() for k, v in encoder.state_dict().items()}, torch.get_rng_state()
    set_gradient_checkpointing(encoder)
    assert not encoder.backbone.training
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_supported_encoders_log_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model whose tensors are all used logs nothing."""
    made = zoo.ZOO["hf: DINOv2"](tmp_path)
    with caplog.at_level(logging.WARNING, logger="zepad_mm"):
        load_encoder(made.source)
    assert not [record for record in caplog.records if record.name.startswith("zepad_mm")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("quick_gelu", "the activation was GELU and is QuickGELU"),
        ("mean", r"mean was \(0.48, 0.45, 0.4\) and is \(0.5, 0.45, 0.4\)"),
        ("interpolation", "interpolation was bicubic and is bilinear"),
        ("weights", "the weights differ"),
    ],
)
def test_fingerprint_names_what_changed(change: str, message: str, tmp_path: Path) -> None:
    """The same for a tuned encoder and for a ZePAD: both hold fingerprints of their encoders."""
    source = write_clip(tmp_path)
    make_zepad(source).save_pretrained(tmp_path / "zepad")
    write_tuned(tmp_path / "tuned", add_lora(load_encoder(source), LoraSettings(rank=2)), {})
    path = tmp_path / "open_clip_config.json"
    config = json.loads(path.read_text())
    if change == "quick_gelu":
        config["model_cfg"]["quick_gelu"] = True
    elif change == "mean":
        config["preprocess_cfg"]["mean"][0] = 0.5
    elif change == "interpolation":
        config["preprocess_cfg"]["interpolation"] = "bilinear"
    else:
        write_clip(tmp_path, seed=1)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_tuned(tmp_path / "tuned")
    with pytest.raises(ValueError, match=f"answers a fixed image differently .* in branch benign {message}"):
        ZePAD.from_pretrained(tmp_path / "zepad")


def test_fingerprint_restores_the_mode(clip_source: str) -> None:
    encoder = load_encoder(clip_source)
    encoder.backbone.transformer.train()
    assert Fingerprint.from_dict(fingerprint(encoder).to_dict()) == fingerprint(encoder)
    assert encoder.backbone.transformer.training
    assert not encoder.training
    assert differences(fingerprint(encoder), encoder) == []
