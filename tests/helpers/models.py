"""Small real models: a CLIP of two layers in open_clip's format, a ZePAD over it, and a convolutional classifier."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from zepad_mm.encoders import LoraSettings, add_lora, load_clip
from zepad_mm.encoders.sources import with_image_size
from zepad_mm.models.branch import Adaptation, Branch, BranchConfig, Role
from zepad_mm.models.gate import GateConfig, gate_for
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import EMBEDDED_MODEL, DetectorConfig, ZePAD, ZePADConfig

CLASSES = ("dress", "hat", "shoes")
TINY_CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {
        "mean": [0.48, 0.45, 0.4],
        "std": [0.26, 0.26, 0.27],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


def write_clip(folder: Path, seed: int = 0) -> str:
    """A randomly initialised CLIP in ``folder``; returns its source string."""
    import open_clip

    torch.manual_seed(seed)
    clip = open_clip.model.CLIP(**TINY_CLIP["model_cfg"])
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items() if name != "attn_mask"}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_CLIP))
    return f"open_clip:local-dir:{folder}"


def write_embedded_at(image_size: int, folder: Path) -> Path:
    """The embedded model at another image size, in ``folder``: fewer pixels make it faster, and less accurate."""
    folder.mkdir(parents=True)
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    resized = {source: with_image_size(source, image_size) for source in ZePADConfig.from_dict(config).sources}
    config["public_source"] = resized[config["public_source"]]
    for branch in config["branches"]:
        branch["source"] = resized[branch["source"]]
    for key in ("fingerprint", "encoders"):  # of the original size
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(EMBEDDED_MODEL / "model.safetensors")
    if (EMBEDDED_MODEL / "branches").is_dir():
        (folder / "branches").symlink_to(EMBEDDED_MODEL / "branches")
    return folder


def make_zepad(source: str, fusion: str = "bounded_benign") -> ZePAD:
    """Two robust branches (one full, one LoRA) and a benign one, all pushed off the base weights a little."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)  # peft draws lora_A from the global generator
    branches, configs = [], []
    kinds: list[tuple[str, Role, Adaptation]] = [
        ("full", "robust", "full"),
        ("lora", "robust", "lora"),
        ("benign", "benign", "none"),
    ]
    for name, role, adaptation in kinds:
        encoder, text = load_clip(source)
        if adaptation == "lora":
            add_lora(encoder, LoraSettings(rank=2))
        with torch.no_grad():
            for key, parameter in encoder.named_parameters():
                if (adaptation == "full") or "lora_B" in key:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        config = BranchConfig(name=name, role=role, source=source, adaptation=adaptation)
        branches.append(Branch(config, encoder, zero_shot_head(text, CLASSES, "single")))
        configs.append(config)
    about = ZePADConfig(
        public_source=source,
        branches=tuple(configs),
        class_names=CLASSES,
        fusion=fusion,
        detector=DetectorConfig(threshold=0.1),
    )
    return ZePAD(about, branches)


def make_gated_zepad(source: str, kind: Literal["learned", "cosine"] = "learned", **config: Any) -> ZePAD:
    """The model of :func:`make_zepad` with a gate of random weights, which sets fusion weights and the score."""
    model = make_zepad(source)
    torch.manual_seed(2)
    settings = GateConfig(kind=kind, threshold=0.0, hidden=16, seen_attacks=("feature_uap",), **config)
    widths = [model.branch(name).encoder.feature_dim for name in model.branches]
    model.set_gate(gate_for(widths, model.benign, settings))
    model.config = replace(model.config, policy_caps={"zero_sacrifice": 0.9, "white_box": 0.3})
    return model.set_fusion("gated").set_detector(DetectorConfig(score="feature_gate", threshold=0.0))


class ConvNet(nn.Module):
    """A few layers with batch statistics, for attacks and training."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
