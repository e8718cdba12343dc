"""Encoders at another image size than their own: which towers allow it, and how the size is stored."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.helpers import encoder_zoo as zoo
from tests.helpers.models import write_clip
from zepad_mm.encoders import load_clip, load_encoder
from zepad_mm.encoders.fingerprint import differences, fingerprint
from zepad_mm.encoders.sources import is_local, parse_source, with_image_size

ONE_SIZE = ("open_clip: ModifiedResNet",)  # its pooling has a position embedding


def test_parse_source_reads_image_size() -> None:
    for text, image_size in (
        ("open_clip:ViT-B-32/openai?image_size=96", 96),
        ("open_clip:ViT-L-14/openai+fare.pt?image_size=336", 336),
        ("hf:acme/clip@main?image_size=64", 64),
        ("hf:acme/clip@main", None),
        ("ssl:a.ckpt?image_size=96", None),
    ):
        source = parse_source(text)
        assert source.image_size == image_size
        assert str(source) == text


def test_with_image_size_replaces_image_size() -> None:
    assert with_image_size("timm:resnet18", None) == "timm:resnet18"
    assert with_image_size("timm:resnet18?image_size=64", 96) == "timm:resnet18?image_size=96"
    assert with_image_size("ssl:a.ckpt?stem=7x7", 96) == "ssl:a.ckpt?stem=7x7&image_size=96"
    assert with_image_size("ssl:a.ckpt?image_size=64&stem=7x7", 96) == "ssl:a.ckpt?stem=7x7&image_size=96"


@pytest.mark.parametrize("image_size", [-1, 0, True, 96.0, "96", 100_000])
def test_load_encoder_rejects_image_size(image_size: Any) -> None:
    with pytest.raises(ValueError, match="image_size: expected a whole number of pixels from 1 to 1024, got"):
        load_encoder("timm:resnet18", pretrained=False, image_size=image_size)


def test_ssl_checkpoint_rejects_image_size(tmp_path: Path) -> None:
    name = next(name for name in zoo.ZOO if name.startswith("ssl"))
    with pytest.raises(ValueError, match="from 1 to 1024, got 100000"):
        load_encoder(f"{zoo.ZOO[name](tmp_path).source.partition('?')[0]}?image_size=100000")


def test_parse_source_rejects_image_size() -> None:
    with pytest.raises(ValueError, match="from 1 to 1024, got 100000"):
        parse_source("timm:resnet18?image_size=100000")


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_load_encoder_at_another_image_size(name: str, tmp_path: Path) -> None:
    source = zoo.ZOO[name](tmp_path).source
    own = load_encoder(source)
    size = 2 * own.preprocess.image_size
    if name in ONE_SIZE:
        with pytest.raises(ValueError, match=f"takes images of {own.preprocess.image_size} pixels, not of {size}"):
            load_encoder(source, image_size=size)
        return
    encoder = load_encoder(source, image_size=size)
    images = torch.rand(2, 3, size, size)
    assert encoder.preprocess.image_size == size
    assert encoder(images).shape == (2, own.feature_dim)
    again = load_encoder(encoder.source)
    assert torch.equal(again(images), encoder(images))
    assert torch.allclose(load_encoder(source, image_size=size // 2)(images), own(images), atol=1e-5)


def test_image_size_is_fingerprinted(tmp_path: Path) -> None:
    write_clip(tmp_path)
    source = f"open_clip:local-dir:{tmp_path}"
    encoder = load_encoder(source)
    larger = load_encoder(source, image_size=2 * encoder.preprocess.image_size)
    assert is_local(larger.source)
    assert any(cause.startswith("image_size was") for cause in differences(fingerprint(encoder), larger))


def test_load_clip_keeps_its_text_tower(tmp_path: Path) -> None:
    write_clip(tmp_path)
    source = f"open_clip:local-dir:{tmp_path}"
    own, text = load_clip(source)
    encoder, same = load_clip(source, image_size=2 * own.preprocess.image_size)
    assert encoder.source == same.source == f"{source}?image_size={2 * own.preprocess.image_size}"
    assert torch.equal(text(["a dog"]), same(["a dog"]))


def test_image_size_must_suit_the_patches(tmp_path: Path) -> None:
    source = zoo.ZOO["open_clip: ViT, MultiheadAttention"](tmp_path).source
    with pytest.raises(ValueError, match="a multiple of its patches of 8 pixels"):
        load_encoder(source, image_size=37)


@pytest.mark.parametrize(("patch", "size"), [(1, 1024), (2, 1024), (1, 512)])
def test_tiny_patches_in_large_images_are_refused_in_time(patch: int, size: int, tmp_path: Path) -> None:
    """A network of a few kilobytes whose attention over one image would take hours."""
    folder = tmp_path / "dinov2"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    hf.Dinov2Model(hf.Dinov2Config(image_size=32, patch_size=patch, **shape)).save_pretrained(folder)
    sides = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    hf.BitImageProcessor(**sides).save_pretrained(folder)
    started = time.monotonic()
    with pytest.raises(ValueError, match="its patches are too small for its images"):
        load_encoder(f"hf:local-dir:{folder}")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("option", ["?image_sise=64", "?image_size=large", "?image_size", "?image_size=64?stem=7x7"])
@pytest.mark.parametrize("name", ["open_clip:embedded", "hf:acme/clip@main", "open_clip:local-dir:models/clip"])
def test_other_options_are_named(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=r"expected the option \?image_size=N, got '\?.*N is a whole number of pix"):
        parse_source(f"{name}{option}")
