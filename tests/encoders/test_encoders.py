"""Encoders match their source library, adapters add exactly W + dW, and errors name bad sources."""

from __future__ import annotations

import copy
import re
import shutil
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn

from zepad_mm.data import EMBEDDED_SIZE, load_data
from zepad_mm.encoders import (
    LoraSettings,
    add_lora,
    has_lora,
    load_clip,
    load_encoder,
    load_lora,
    merge_lora,
    optimize_for_inference,
)
from zepad_mm.encoders.attention import SeparateAttention, unfuse_attention, use_fast_attention
from zepad_mm.encoders.base import Encoder, Preprocess
from zepad_mm.encoders.open_clip import EMBEDDED_CLIP
from zepad_mm.models.zepad import ZePAD


def perturb_adapter(encoder: nn.Module, scale: float = 0.1) -> None:
    """Make the delta of an adapter non-zero: peft starts B at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def test_open_clip_encoder_matches_library(clip_source: str) -> None:
    """The same image through open_clip's own transform and tower, and through the encoder."""
    from PIL import Image

    from zepad_mm.data import to_tensor

    name = clip_source.removeprefix("open_clip:")
    clip, _, transform = open_clip.create_model_and_transforms(name)
    encoder = load_encoder(clip_source)
    pixels = (torch.rand(48, 48, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    small = Image.fromarray(pixels).resize((32, 32))
    with torch.no_grad():
        theirs = clip.eval().encode_image(transform(small)[None])
        ours = encoder(to_tensor(small)[None])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert encoder.feature_dim == theirs.shape[1] == 24


def test_embedded_clip_matches_library_and_asks_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both towers as open_clip alone loads them, with the tokenizer that lies beside the weights."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"asked for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    name = f"local-dir:{EMBEDDED_CLIP}"
    clip = open_clip.create_model(name, precision="fp32").eval()
    texts = ["a photo of a Cat.", "a naïve  zebra", "", "猫"]
    images = torch.rand(2, 3, EMBEDDED_SIZE, EMBEDDED_SIZE, generator=torch.Generator().manual_seed(0))
    encoder, text = load_clip("open_clip:embedded")
    preprocess = encoder.preprocess
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), clip.encode_image((images - mean) / std), atol=1e-4, rtol=1e-4)
        theirs = clip.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
        torch.testing.assert_close(text(texts), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "tf_efficientnet_lite0"])
def test_timm_encoder_matches_library(name: str) -> None:
    import timm

    encoder = load_encoder(f"timm:{name}", pretrained=False)
    size = encoder.preprocess.image_size
    assert size == 224 or name == "resnet10t"
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    config = timm.data.resolve_model_data_config(encoder.backbone)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), encoder.backbone((images - mean) / std), atol=1e-5, rtol=1e-5)


def test_timm_vit_uses_its_own_image_size() -> None:
    """timm's config still holds 224 then, unlike the model."""
    import timm

    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    assert timm.data.resolve_model_data_config(backbone)["input_size"][-1] == 224
    assert backbone.patch_embed.img_size == (32, 32)


def test_encoder_input_gradient_is_finite_everywhere(clip_source: str, images: torch.Tensor) -> None:
    encoder = load_encoder(clip_source)
    big = torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(encoder(big).square().sum(), big)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("mode", ["squash", "shortest"])
def test_preprocess_resize_keeps_range_and_centre(mode: str) -> None:
    preprocess = Preprocess(image_size=16, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode)
    images = torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    resized = preprocess.resize(images)
    assert resized.shape == (1, 3, 16, 16)
    assert resized.min() >= 0
    assert resized.max() <= 1
    if mode == "shortest":
        torch.testing.assert_close(resized, images[..., 8:24])
    with pytest.raises(ValueError, match="resize_mode"):
        Preprocess(image_size=16, mean=(0,), std=(1,), resize_mode="crop")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "boolean", "added", "by head"])
def test_use_fast_attention_keeps_outputs(batch_first: bool, mask: str) -> None:
    holder = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, batch_first=batch_first)})
    names = list(holder.state_dict())
    plain, x = copy.deepcopy(holder)["attention"], torch.randn(2, 5, 16)
    x = x if batch_first else x.transpose(0, 1)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    added = torch.zeros(5, 5).masked_fill(causal, -torch.inf)
    masks = {"none": None, "boolean": causal, "added": added, "by head": added.repeat(8, 1, 1)}
    assert (use_fast_attention(holder), use_fast_attention(holder)) == (1, 0)
    copied = copy.deepcopy(holder)
    with torch.no_grad():
        holder["attention"].in_proj_weight.zero_()  # a copy computes with its own weights
    both = (copied["attention"], plain)
    for asked in ({"need_weights": False}, {}):
        inputs = [x.clone().requires_grad_(True) for _ in range(2)]
        outputs = [each(z, z, z, attn_mask=masks[mask], **asked) for each, z in zip(both, inputs, strict=True)]
        assert (outputs[0][1] is None) == (outputs[1][1] is None) == bool(asked)
        torch.testing.assert_close(outputs[0][0], outputs[1][0])
        gradients = [torch.autograd.grad(out[0].square().sum(), z)[0] for out, z in zip(outputs, inputs, strict=True)]
        torch.testing.assert_close(*gradients)
    assert list(copied.state_dict()) == names
    other = torch.randn_like(x)
    torch.testing.assert_close(copied["attention"](x, other, other)[0], plain(x, other, other)[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_unfuse_attention_keeps_outputs(batch_first: bool, masked: bool) -> None:
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(24, 4, batch_first=batch_first).eval()
    holder = nn.ModuleDict({"attn": fused})
    tokens = torch.randn(3, 5, 24)
    mask = torch.full((5, 5) if batch_first else (3, 3), float("-inf")).triu(1) if masked else None
    expected = fused(tokens, tokens, tokens, need_weights=False, attn_mask=mask)[0]
    assert unfuse_attention(holder) == 1
    got = holder["attn"](tokens, tokens, tokens, need_weights=False, attn_mask=mask)[0]
    assert isinstance(holder["attn"], SeparateAttention)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "conv", "efficientnet"])
def test_lora_adds_delta_before_and_after_merging(kind: str, clip_source: str) -> None:
    """Against weights added by hand; peft doubles out_proj inside nn.MultiheadAttention, which this would show."""
    source = {"clip": clip_source, "conv": "timm:resnet10t", "efficientnet": "timm:tf_efficientnet_lite0"}[kind]
    torch.manual_seed(0)
    encoder = load_encoder(source, pretrained=kind == "clip")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = encoder(images)
        unfuse_attention(encoder.backbone)
        by_hand = {name: parameter.clone() for name, parameter in encoder.backbone.named_parameters()}
        add_lora(encoder, LoraSettings(rank=2, alpha=6.0))
        torch.testing.assert_close(encoder(images), before, atol=1e-5, rtol=1e-4)
        perturb_adapter(encoder)
        adapted = encoder(images)
        for name, module in encoder.backbone.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                delta = 3.0 * (b.flatten(1) @ a.flatten(1)).view(by_hand[f"{name}.weight"].shape)
                by_hand[f"{name}.weight"] += delta
        merge_lora(encoder)
        merged = encoder(images)
        assert not has_lora(encoder)
        for name, parameter in encoder.backbone.named_parameters():
            torch.testing.assert_close(parameter, by_hand[name], atol=1e-5, rtol=1e-4)
    scale = adapted.abs().max()
    assert (adapted - before).abs().max() > 1e-3 * scale
    torch.testing.assert_close(merged / scale, adapted / scale, atol=1e-4, rtol=1e-3)


def test_lora_every_adapter_gets_a_gradient(clip_source: str, images: torch.Tensor) -> None:
    """Inside nn.MultiheadAttention the one on out_proj gets none."""
    encoder = add_lora(load_encoder(clip_source), LoraSettings(rank=2))
    perturb_adapter(encoder)
    encoder(images).square().sum().backward()
    trained = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert any("out_proj" in name for name in trained)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained.values())


def test_lora_adapter_loads_with_peft_alone(clip_source: str, images: torch.Tensor, tmp_path: Path) -> None:
    """Saved by us, loaded by peft alone, and by us; twice adapted is an error."""
    from peft import PeftConfig, PeftModel

    encoder = add_lora(load_encoder(clip_source), LoraSettings(rank=2))
    perturb_adapter(encoder)
    encoder.backbone.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == clip_source
    plain = load_encoder(clip_source)
    unfuse_attention(plain.backbone)
    plain.backbone = PeftModel.from_pretrained(plain.backbone, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(images), encoder.eval()(images))
        torch.testing.assert_close(load_lora(load_encoder(clip_source), tmp_path)(images), encoder(images))
    with pytest.raises(ValueError, match="has a LoRA adapter already"):
        add_lora(encoder)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_lora(load_encoder(clip_source), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_lora(load_encoder(clip_source), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet18", "expected KIND:NAME"),
        ("timn:resnet18", "did you mean 'timm'"),
        ("timm:resnet18x", "timm has no model 'resnet18x'; did you mean 'resnet18'?"),
        ("open_clip:ViT-B-33/openai", "did you mean 'ViT-B-32'?"),
        ("open_clip:embeded", "did you mean 'embedded'?"),
        ("open_clip:ViT-B-32/open-ai", "no weights 'open-ai' of ViT-B-32; did you mean 'openai'?"),
        ("open_clip:", "expected KIND:NAME"),
    ],
)
def test_load_encoder_rejects_unknown_sources(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_encoder(source)


def test_models_and_data_sets_suggest_the_nearest_name() -> None:
    for name, nearest in (("embeded", "embedded"), ("openclip:embedded", "open_clip:embedded")):
        with pytest.raises(FileNotFoundError, match=f"did you mean '{nearest}'"):
            ZePAD.from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="did you mean 'embedded'"):
        load_data("embeded", "train")


def test_load_encoder_names_missing_and_truncated_checkpoints(clip_source: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_encoder("open_clip:local-dir:/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="save_for_hf"):
        load_encoder("timm:local-dir:/nowhere/at/all")
    shutil.copytree(clip_source.removeprefix("open_clip:local-dir:"), tmp_path / "clip")
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_encoder(f"open_clip:local-dir:{tmp_path / 'clip'}")


def test_text_embeddings_are_unit_length_and_cached(clip_source: str) -> None:
    _, text = load_clip(clip_source)
    first = text.class_embeddings(["cat", "dog"], "photo")
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(2))
    assert text.class_embeddings(["cat", "dog"], "photo") is first
    assert text.class_embeddings(["cat"], ["a {}.", "the {}."]).shape == (1, 24)
    with pytest.raises(ValueError, match="the list is empty"):
        text.class_embeddings([])
    with pytest.raises(ValueError, match="expected a source of kind open_clip"):
        load_clip("timm:resnet10t")


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "convnext_atto"])
def test_optimize_for_inference_keeps_outputs(name: str) -> None:
    torch.manual_seed(0)
    encoder = load_encoder(f"timm:{name}", pretrained=False)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    lighter = optimize_for_inference(encoder)
    pixels = torch.rand(3, 3, 64, 64)
    assert torch.allclose(lighter(pixels), encoder(pixels), rtol=1e-3, atol=1e-4 * float(encoder(pixels).abs().max()))
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lighter.modules())
    assert (lighter is encoder) == (name == "convnext_atto")  # nothing to fold: not copied either
    filters = [module.weight for module in lighter.modules() if isinstance(module, nn.Conv2d)]
    assert lighter is encoder or all(one.is_contiguous(memory_format=torch.channels_last) for one in filters)


def test_optimize_for_inference_folds_adapters(clip_source: str, images: torch.Tensor) -> None:
    encoder = add_lora(load_encoder(clip_source), LoraSettings(rank=2))
    perturb_adapter(encoder)
    lighter = optimize_for_inference(encoder, 32)
    assert has_lora(encoder)
    assert not has_lora(lighter)
    assert torch.allclose(lighter(images), encoder(images), atol=1e-5)


def test_optimize_for_inference_keeps_a_norm_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            once = self.norm(self.convolution(images))
            return self.norm(self.convolution(once)).flatten(1)

    backbone = Twice().eval()
    encoder = Encoder(backbone, Preprocess(image_size=8, mean=(0, 0, 0), std=(1, 1, 1)), 192, "twice")
    assert optimize_for_inference(encoder, 8) is encoder


def test_load_encoder_without_weights_does_not_warn(clip_source: str, caplog: pytest.LogCaptureFixture) -> None:
    load_encoder(clip_source, pretrained=False)
    assert "No pretrained weights" not in caplog.text
