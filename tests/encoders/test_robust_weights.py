"""Robust weights as FARE, TeCoA, Delta-CLIP and open_clip publish them, over a base CLIP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from tests.helpers.models import make_zepad, write_clip
from zepad_mm.encoders import load_clip, load_encoder
from zepad_mm.encoders.sources import Source, parse_source
from zepad_mm.models.branch import Branch
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import ZePAD


def robust_formats(clip: Any) -> dict[str, Any]:
    """How FARE, TeCoA, Delta-CLIP and open_clip's training publish a CLIP."""
    return {
        "fare": clip.visual.state_dict(),
        "tecoa": {
            "epoch": 10,
            "state_dict": {"prompt.weight": torch.zeros(2)},
            "vision_encoder_state_dict": clip.visual.state_dict(),
        },
        "delta_clip": clip.state_dict(),
        "open_clip_training": {"epoch": 5, "name": "run", "state_dict": nn.DataParallel(clip).state_dict()},
        "robust_vlm": {f"model.visual.{key}": value for key, value in clip.visual.state_dict().items()},
    }


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """The source of a base, another CLIP of the same shape in memory, and a folder."""
    import open_clip

    folder = tmp_path_factory.mktemp("robust")
    for name, seed in (("base", 0), ("tuned+", 1)):
        (folder / name).mkdir()
        write_clip(folder / name, seed)
    clip = open_clip.create_model(f"local-dir:{folder / 'tuned+'}").eval()
    return f"open_clip:local-dir:{folder / 'base'}", clip, folder


@pytest.mark.parametrize("published", ["fare", "tecoa", "delta_clip", "open_clip_training", "robust_vlm"])
def test_robust_weights_replace_the_base(robust: tuple[str, Any, Path], published: str, images: Tensor) -> None:
    base, clip, folder = robust
    path = folder / f"{published}.pt"
    torch.save(robust_formats(clip)[published], path)
    encoder, text = load_clip(f"{base}+{path}")
    _, public_text = load_clip(base)
    with torch.no_grad():
        expected = clip.encode_image(encoder.preprocess(images))
        torch.testing.assert_close(encoder(images), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(load_encoder(f"{base}+{path}")(images), expected, atol=1e-6, rtol=1e-6)
        same_text = torch.equal(text(["a cat"]), public_text(["a cat"]))
    assert same_text == (published in ("fare", "tecoa", "robust_vlm"))


def test_robust_weights_make_a_branch(robust: tuple[str, Any, Path], tmp_path: Path, images: Tensor) -> None:
    """A ZePAD names them by their source and stores nothing of them."""
    base, clip, folder = robust
    torch.save(clip.visual.state_dict(), folder / "ready.pt")
    zepad = make_zepad(base)
    encoder, text = load_clip(f"{base}+{folder / 'ready.pt'}")
    config = replace(zepad.config.branches[0], name="ready", source=encoder.source, adaptation="none")
    branch = Branch(config, encoder, zero_shot_head(text, zepad.class_names, "single"))
    benign = zepad.branch("benign")
    model = ZePAD(replace(zepad.config, branches=(config, benign.config)), [branch, benign])
    model.save_pretrained(tmp_path)
    loaded = ZePAD.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decide(images).logits, model.decide(images).logits)
    assert (tmp_path / "model.safetensors").stat().st_size < 3000


def test_robust_weights_reject_another_model(robust: tuple[str, Any, Path]) -> None:
    base, clip, folder = robust
    good = clip.visual.state_dict()

    def expect(content: Any, message: str) -> None:
        torch.save(content, folder / "bad.pt")
        with pytest.raises(ValueError, match=message):
            load_encoder(f"{base}+{folder / 'bad.pt'}")

    expect({k: v for k, v in good.items() if k != "proj"}, "lacks proj of the image tower, 1 in all")
    expect({**good, "adapter.weight": torch.zeros(1)}, "has the unknown adapter.weight")
    expect(
        {**good, "positional_embedding": torch.zeros(50, 32)}, r"positional_embedding \(50, 32\) instead of \(17, 32\)"
    )
    expect(resnet18().state_dict(), "expected an open_clip state dict or that of its image tower")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_encoder(f"{base}+/nowhere.pt")
    with pytest.raises(ValueError, match=r"expected open_clip:BASE\+FILE"):
        load_encoder("open_clip:ViT-B-32/openai+")


def test_parse_source_reads_back_every_part(robust: tuple[str, Any, Path]) -> None:
    folder = robust[2]
    inside = Source("open_clip", str(folder / "tuned+"), "local-dir")
    for source in (
        inside,
        replace(inside, weights="a+b.pt"),
        Source("open_clip", "ViT-L-14/openai", weights="fare.pt"),
        Source("open_clip", "org/repo", "hf-hub", "v2"),
        Source("hf", "org/repo", revision="v2"),
        Source("ssl", "some+file@1.ckpt", options="stem=3x3p1"),
    ):
        assert parse_source(str(source)) == source
