"""Checks that every encoder passes, whatever library it comes from; each raises or returns what it measured."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tests.helpers.encoder_zoo import Made
from zepad_mm.encoders import (
    Encoder,
    LoraSettings,
    add_lora,
    has_lora,
    is_clip,
    load_clip,
    load_encoder,
    merge_lora,
    set_gradient_checkpointing,
)
from zepad_mm.encoders.attention import unfuse_attention
from zepad_mm.encoders.huggingface import NaFlexBackbone
from zepad_mm.encoders.sources import parse_source
from zepad_mm.models.branch import Adaptation, Branch, BranchConfig, Role
from zepad_mm.models.heads import HEADS, zero_shot_head
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.training.artifacts import load_tuned, write_tuned
from zepad_mm.training.heads import HeadSettings, train_head_on_features

TOLERANCE = 1e-5  # of parity, in features and in zero-shot probabilities, fp32
CLASSES = ("cat", "dog", "ball")


@dataclass(frozen=True)
class Row:
    """One row of the encoder table."""

    name: str
    feature_dim: int
    parity: float  # largest difference of features to the source library's own
    smallest_gradient: float  # over images, of the largest |d features / d pixel|
    lora_error: float  # largest |adapted - weights + delta by hand|, before and after merging, to the largest feature
    lora_layers: int
    saved: str  # what was saved and loaded bit for bit
    checkpointing: str  # gradient checkpointing
    task: str  # zero-shot or probe, and its result


def smooth_images(height: int, width: int, count: int = 2) -> Tensor:
    """Smooth images (B, 3, H, W) well inside [0, 1]: a bicubic filter does not leave the range, so nothing is cut."""
    rows, columns = torch.linspace(0, 5, height).view(-1, 1), torch.linspace(0, 5, width)
    shifts = torch.arange(3 * count).view(count, 3, 1, 1) * 0.7
    return (rows + shifts).sin() * (columns - shifts).cos() * 0.3 + 0.5


@torch.no_grad()
def parity(made: Made, encoder: Encoder) -> float:
    """Largest difference on images that must be resized: a large one, an upright one where aspects are kept."""
    size = encoder.preprocess.image_size
    shapes = [(3 * size // 2, 3 * size // 2)]
    if not isinstance(encoder.backbone, NaFlexBackbone):  # which keeps aspects, where we squash
        shapes += [(size + 17, size + 4), (size - 4, size + 9)]
    if (encoder.preprocess.resize_size or size) == size:
        shapes.append((size, size))
    gaps = []
    for shape in shapes:
        images = smooth_images(*shape)
        ours, theirs = encoder(images), made.features(images)
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
        gaps.append(float((ours - theirs).abs().max()))
    return max(gaps)


def gradient(encoder: Encoder) -> float:
    """Smallest, over images, of the largest gradient to a pixel; finite and not zero."""
    size = encoder.preprocess.image_size
    images = smooth_images(size + 6, size + 3).requires_grad_(True)
    weights = torch.randn(2, encoder.feature_dim, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((encoder(images) * weights).sum(), images)
    strongest = found.abs().amax((1, 2, 3)).min()
    if not torch.isfinite(found).all() or strongest <= 0:
        raise ValueError(f"the gradient to the input of {encoder.source} is {float(strongest)}")
    return float(strongest)


def perturb_adapter(encoder: Encoder) -> None:
    """Make the delta of an adapter non-zero: peft starts B at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def lora(source: str) -> tuple[float, int]:
    """W + dW by hand against the adapter, before and after merging; every adapter gets a gradient."""
    encoder = load_encoder(source)
    images = smooth_images(encoder.preprocess.image_size, encoder.preprocess.image_size)
    with torch.no_grad():
        before = encoder(images)
    by_hand = copy.deepcopy(encoder)
    unfuse_attention(by_hand.backbone)
    add_lora(encoder, LoraSettings(rank=2, alpha=6.0))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), before, atol=1e-5, rtol=1e-4)
    perturb_adapter(encoder)
    layers = dict(by_hand.backbone.named_modules())
    adapted_layers = 0
    backbone: Any = encoder.backbone  # a PeftModel
    for name, module in backbone.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            weight = layers[name].weight
            with torch.no_grad():
                weight += 3.0 * (b.flatten(1) @ a.flatten(1)).view(weight.shape)
            adapted_layers += 1
    encoder(images).square().sum().backward()
    idle = [name for name, p in encoder.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    if idle:
        raise ValueError(f"{source}: no gradient reaches {idle[:3]}")
    with torch.no_grad():
        expected, adapted = by_hand(images), encoder(images)
        merged = merge_lora(encoder)(images)
    scale = float(expected.abs().max())
    error = max(float((adapted - expected).abs().max()), float((merged - expected).abs().max())) / scale
    changed = float((expected - before).abs().max()) / scale
    if has_lora(encoder) or not error < 1e-4 or changed < 10 * error:
        raise ValueError(f"{source}: adapter is not W + dW: error {error:.2g}, change {changed:.2g}")
    return error, adapted_layers


def saved(source: str, folder: Path) -> str:
    """A tuned encoder, an adapter (by us, by peft alone), a ZePAD over both and the base: all come back bit for bit."""
    base = load_encoder(source)
    images = smooth_images(base.preprocess.image_size, base.preprocess.image_size)
    full, adapted = load_encoder(source), add_lora(load_encoder(source), LoraSettings(rank=2))
    perturb_adapter(adapted)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    for name, encoder in (("full", full), ("lora", adapted)):
        write_tuned(folder / name, encoder.eval(), {})
        # none with a gradient, on both sides: where a weight has one, torch below 2.14 may round otherwise
        encoder.requires_grad_(False)
        back = load_tuned(folder / name).requires_grad_(False)
        with torch.no_grad():
            torch.testing.assert_close(back(images), encoder(images), atol=0, rtol=0)
    roles: dict[Adaptation, Role] = {"full": "robust", "lora": "robust", "none": "benign"}
    configs = [
        BranchConfig(name=f"{name}-tuned", role=role, source=source, adaptation=name, head="linear")
        for name, role in roles.items()
    ]
    encoders = (full, adapted, base)
    heads: list[nn.Module] = [HEADS.get("linear")(base.feature_dim, len(CLASSES)) for _ in configs]
    branches = [Branch(*parts) for parts in zip(configs, encoders, heads, strict=True)]
    model = ZePAD(ZePADConfig(public_source=source, branches=tuple(configs), class_names=CLASSES), branches)
    model.save_pretrained(folder / "zepad")
    alone = load_encoder(source)
    unfuse_attention(alone.backbone)
    alone.backbone = PeftModel.from_pretrained(alone.backbone, str(folder / "zepad" / "branches" / "lora-tuned")).eval()
    alone.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(alone(images), adapted(images), atol=0, rtol=0)
    loaded = ZePAD.from_pretrained(folder / "zepad")
    torch.testing.assert_close(loaded.decide(images).logits, model.decide(images).logits, atol=1e-6, rtol=1e-6)
    return "tuned, adapter, ZePAD"


def checkpointing(source: str) -> str:
    """Return whether gradient checkpointing works; where it does, the gradient of an adapter is unchanged."""
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        encoder = add_lora(load_encoder(source), LoraSettings(rank=2)).eval()
        perturb_adapter(encoder)
        if enabled:
            try:
                set_gradient_checkpointing(encoder)
            except ValueError:
                return "none that runs"
        if parse_source(source).kind == "hf":
            encoder.train()  # transformers recomputes in training mode only; these have no dropout
            for module in encoder.modules():
                if isinstance(module, nn.BatchNorm2d | nn.Dropout):
                    module.eval()
        encoder(smooth_images(encoder.preprocess.image_size, encoder.preprocess.image_size)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    return "same gradient"


@torch.no_grad()
def zero_shot(made: Made) -> str:
    """The zero-shot head's probabilities against the library's own, and its raw logits once the bias is added."""
    encoder, text = load_clip(made.source)
    size = encoder.preprocess.image_size
    images = smooth_images(3 * size // 2, 3 * size // 2)
    head = zero_shot_head(text, CLASSES, "single")
    ours = head(encoder(images)) + text.logit_bias
    assert made.logits is not None
    theirs = made.logits(images, [f"a photo of a {name}." for name in CLASSES])
    gap = float((ours.softmax(-1) - theirs.softmax(-1)).abs().max())
    raw = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
    if not max(gap, raw) < TOLERANCE:
        raise ValueError(f"{made.source}: zero-shot probabilities differ by {gap:.2g}, logits by {raw:.2g}")
    return f"zero-shot, {gap:.0e}"


def probe(encoder: Encoder) -> str:
    """A linear probe separates reddish from bluish stripes on held-out images."""
    size, count = encoder.preprocess.image_size, 160
    generator = torch.Generator().manual_seed(0)
    phase, tint = (torch.rand(count, n, 1, 1, generator=generator) for n in (1, 3))
    labels = torch.arange(count) % 2
    tint = 0.3 * tint + torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.3, 0.7]])[labels].view(-1, 3, 1, 1)
    wave = ((torch.linspace(0, 3, size) + phase) * 2 * math.pi).sin().expand(-1, -1, size, -1)
    with torch.no_grad():
        features = encoder((0.8 + 0.2 * wave) * tint)
    train = count * 4 // 5
    features = (features - features[:train].mean(0)) / features[:train].std(0).clamp_min(1e-6)
    head = nn.Linear(encoder.feature_dim, 2)
    train_head_on_features(head, features[:train], labels[:train], HeadSettings(epochs=40, lr=0.05))
    with torch.no_grad():
        accuracy = float((head(features[train:]).argmax(-1) == labels[train:]).float().mean())
    if accuracy < 0.8:
        raise ValueError(f"{encoder.source}: a probe on red and blue stripes has an accuracy of only {accuracy:.0%}")
    return f"probe, {accuracy:.0%}"


def check(name: str, made: Made, folder: Path) -> Row:
    """All checks for one model."""
    encoder = load_encoder(made.source)
    if is_clip(made.source) != (made.logits is not None):
        raise ValueError(f"is_clip({made.source!r}) is wrong")
    error, layers = lora(made.source)
    return Row(
        name=name,
        feature_dim=encoder.feature_dim,
        parity=parity(made, encoder),
        smallest_gradient=gradient(encoder),
        lora_error=error,
        lora_layers=layers,
        saved=saved(made.source, folder),
        checkpointing=checkpointing(made.source),
        task=zero_shot(made) if made.logits else probe(encoder),
    )
