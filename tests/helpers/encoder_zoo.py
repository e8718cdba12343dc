"""Small, randomly initialised models of every kind that ``load_encoder`` takes, written to disk by their own libraries.

Each entry writes a model into a folder and says what the source library itself answers: its own preprocessing and its
own forward. Used by ``benchmarks/encoder_table.py`` and by the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, ResNet

SIDE = 32
MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)


@dataclass(frozen=True)
class Made:
    """A model on disk, and the outputs of its own library.

    ``features`` maps (B, 3, H, W) pixels in [0, 1] of any size to features. ``logits`` maps images and texts to the
    library's own scaled similarities (CLIPs only).
    """

    source: str
    features: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor, list[str]], Tensor] | None = None


ZOO: dict[str, Callable[[Path], Made]] = {}


def entry(name: str) -> Callable[[Callable[[Path], Made]], Callable[[Path], Made]]:
    """Register a builder under ``kind: model``."""

    def store(build: Callable[[Path], Made]) -> Callable[[Path], Made]:
        ZOO[name] = build
        return build

    return store


def away_from_defaults(module: Any) -> Any:
    """Move norms and biases off their neutral values, where zeros hide errors; return the module in eval mode."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and tensor.ndim == 1 and len(tensor) > 1:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


# ---- open_clip -------------------------------------------------------------------------------------------------

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": SIDE, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16}


# open_clip takes timm towers by name only: register small ones of timm's classes under new names


@timm.models.register_model
def zepad_zoo_resnet(pretrained: bool = False, **arguments: Any) -> nn.Module:
    return timm.models.resnet18(**SMALL_RESNET, **arguments)


@timm.models.register_model
def zepad_zoo_siglip(pretrained: bool = False, **arguments: Any) -> nn.Module:
    return timm.models.vit_base_patch16_siglip_224(**SMALL_VIT, **arguments)


SMALL_VIT = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
SMALL_RESNET = {"channels": [16, 24, 32, 48], "layers": [1, 1, 1, 1], "zero_init_last": False}


def _open_clip(folder: Path, vision: dict[str, Any], resize_mode: str = "shortest", **more: Any) -> Made:
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {**TEXT, **more.pop("text", {})}} | more,
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": resize_mode},
    }
    custom = config["model_cfg"].pop("custom_text", False)
    build = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    clip = away_from_defaults(build(**config["model_cfg"]))
    if custom:
        config["model_cfg"]["custom_text"] = True
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    name = f"local-dir:{folder}"
    clip, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    clip.eval()

    def logits(images: Tensor, texts: list[str]) -> Tensor:
        return clip.get_logits(transform(images), tokenizer(texts))[0]

    return Made(f"open_clip:{name}", lambda images: clip.encode_image(transform(images)), logits)


entry("open_clip: ViT, MultiheadAttention")(lambda folder: _open_clip(folder, VIT))
entry("open_clip: ViT, QuickGELU, squash")(lambda folder: _open_clip(folder, VIT, "squash", quick_gelu=True))
entry("open_clip: ViT, fused in_proj, q/k norm")(
    lambda folder: _open_clip(folder, {**VIT, "block_type": "custom", "qk_norm": True, "scale_attn_inner": True})
)
entry("open_clip: ModifiedResNet")(
    lambda folder: _open_clip(folder, {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32})
)
entry("open_clip: timm tower")(
    lambda folder: _open_clip(
        folder, {"image_size": 64, "timm_model_name": "zepad_zoo_resnet", "timm_pool": "avg", "timm_proj": "linear"}
    )
)
entry("open_clip: SigLIP style")(
    lambda folder: _open_clip(
        folder,
        {"image_size": SIDE, "timm_model_name": "zepad_zoo_siglip", "timm_pool": "map", "timm_proj": "none"},
        "squash",
        text={"pool_type": "last", "no_causal_mask": True},
        init_logit_bias=-10.0,
        custom_text=True,
        embed_dim=32,
    )
)


# ---- transformers ----------------------------------------------------------------------------------------------

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
PATCHES = {"image_size": SIDE, "patch_size": 8, **TINY}
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
CROP = {"size": {"shortest_edge": 40}, "crop_size": {"height": SIDE, "width": SIDE}}
CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


def _hf(folder: Path, model: Any, processor: Any, pooled: Callable[[Any, Any], Tensor] | None = None) -> Made:
    away_from_defaults(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    loaded = hf.AutoModel.from_pretrained(folder).eval()
    own = hf.AutoImageProcessor.from_pretrained(folder)

    def features(images: Tensor) -> Tensor:
        inputs = own(images=list(images * 255), return_tensors="pt")
        return pooled(loaded, inputs) if pooled else loaded(**inputs).pooler_output.flatten(1)

    return Made(f"hf:local-dir:{folder}", features)


def _letters() -> Any:
    """Return a tokenizer of CLIP's class for single letters."""
    words = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz.,Ġ" for end in ("", "</w>")]
    names = ["<|startoftext|>", "<|endoftext|>", *words]
    return hf.CLIPTokenizer(vocab={name: index for index, name in enumerate(names)}, merges=[], model_max_length=40)


def _hf_clip(folder: Path, model: Any, processor: Any) -> Made:
    made = _hf(folder, model, processor, lambda own, inputs: own.get_image_features(**inputs).pooler_output)
    _letters().save_pretrained(folder)
    own, tokenizer = hf.AutoModel.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    processor = hf.AutoImageProcessor.from_pretrained(folder)
    padding = "max_length" if "siglip" in own.config.model_type else True

    def logits(images: Tensor, texts: list[str]) -> Tensor:
        words = tokenizer(texts, padding=padding, max_length=40, truncation=True, return_tensors="pt")
        return own(**processor(images=list(images * 255), return_tensors="pt"), **words).logits_per_image

    return Made(made.source, made.features, logits)


LETTERS = {**TINY, "vocab_size": 60, "max_position_embeddings": 40, "bos_token_id": 0, "eos_token_id": 1}


@entry("hf: CLIP")
def _(folder: Path) -> Made:
    config = hf.CLIPConfig(vision_config=PATCHES, text_config=LETTERS, projection_dim=24)
    return _hf_clip(folder, hf.CLIPModel(config), hf.CLIPImageProcessor(**CROP))


@entry("hf: SigLIP")
def _(folder: Path) -> Made:
    config = hf.SiglipConfig(vision_config=PATCHES, text_config=LETTERS)
    return _hf_clip(folder, hf.SiglipModel(config), hf.SiglipImageProcessor(**SQUARE))


@entry("hf: SigLIP 2, flexible resolution")
def _(folder: Path) -> Made:
    vision = {**TINY, "patch_size": 8, "num_patches": 16}
    model = hf.Siglip2Model(hf.Siglip2Config(vision_config=vision, text_config=LETTERS))
    return _hf_clip(folder, model, hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16))


@entry("hf: DINOv2")
def _(folder: Path) -> Made:
    config = hf.Dinov2Config(
        **{key: value for key, value in PATCHES.items() if key != "intermediate_size"}, mlp_ratio=2
    )
    return _hf(folder, hf.Dinov2Model(config), hf.BitImageProcessor(**CROP))


@entry("hf: DINOv3")
def _(folder: Path) -> Made:
    config = hf.DINOv3ViTConfig(**PATCHES, num_register_tokens=2)
    return _hf(folder, hf.DINOv3ViTModel(config), hf.DINOv3ViTImageProcessor(**SQUARE))


@entry("hf: ViT")
def _(folder: Path) -> Made:
    return _hf(folder, hf.ViTModel(hf.ViTConfig(**PATCHES)), hf.ViTImageProcessor(**SQUARE))


@entry("hf: ViT classifier, no pooler")
def _(folder: Path) -> Made:
    model = hf.ViTForImageClassification(hf.ViTConfig(**PATCHES))
    return _hf(folder, model, hf.ViTImageProcessor(**SQUARE), lambda own, inputs: own(**inputs).last_hidden_state[:, 0])


@entry("hf: ViT-MAE")
def _(folder: Path) -> Made:
    decoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.ViTMAEConfig(**PATCHES, **{f"decoder_{key}": value for key, value in decoder.items()})

    def unmasked(own: Any, inputs: Any) -> Tensor:
        own.config.mask_ratio = 0.0
        noise = torch.arange(16.0).expand(len(inputs["pixel_values"]), -1)
        return own(**inputs, noise=noise).last_hidden_state[:, 0]

    return _hf(folder, hf.ViTMAEForPreTraining(config), hf.ViTImageProcessor(**SQUARE), unmasked)


@entry("hf: ConvNeXt")
def _(folder: Path) -> Made:
    model = hf.ConvNextForImageClassification(hf.ConvNextConfig(image_size=SIDE, **CONV, layer_scale_init_value=0.5))
    return _hf(folder, model, hf.ConvNextImageProcessor(size={"shortest_edge": SIDE}))


@entry("hf: ResNet")
def _(folder: Path) -> Made:
    model = hf.ResNetModel(hf.ResNetConfig(embedding_size=8, layer_type="basic", **CONV))
    return _hf(folder, model, hf.ConvNextImageProcessor(size={"shortest_edge": SIDE}))


# ---- timm ------------------------------------------------------------------------------------------------------


def _timm(folder: Path, name: str, size: int, **arguments: Any) -> Made:
    overlay = {"input_size": (3, size, size)}
    model = away_from_defaults(timm.create_model(name, num_classes=0, pretrained_cfg_overlay=overlay, **arguments))
    timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    own = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(own), is_training=False)
    return Made(f"timm:local-dir:{folder}", lambda images: own(transform(images)))


entry("timm: ViT")(lambda folder: _timm(folder, "vit_tiny_patch16_224", SIDE, **SMALL_VIT))
entry("timm: ResNet")(lambda folder: _timm(folder, "resnet18", 64, **SMALL_RESNET))
entry("timm: ConvNeXt")(
    lambda folder: _timm(folder, "convnext_atto", 64, dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], ls_init_value=0.5)
)
entry("timm: EfficientNet")(lambda folder: _timm(folder, "tf_efficientnet_lite0", 64))


# ---- ssl -------------------------------------------------------------------------------------------------------


def _plain(size: int, resize: int, mean: tuple[float, ...], std: tuple[float, ...]) -> transforms.Compose:
    """Return the preprocessing of these methods' own evaluations."""
    steps = [transforms.Resize(resize), transforms.CenterCrop(size), transforms.Normalize(mean, std)]
    return transforms.Compose(steps)


@entry("ssl: ResNet of solo-learn, 3x3 stem")
def _(folder: Path) -> Made:
    folder.mkdir(parents=True, exist_ok=True)
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.fc, model.maxpool = nn.Identity(), nn.Identity()
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=2, bias=False)  # as solo-learn's BaseMethod for CIFAR
    away_from_defaults(model)
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    head = {"classifier.weight": torch.zeros(10, 512), "projector.0.weight": torch.zeros(8, 512)}
    torch.save({"state_dict": {**state, **head}, "epoch": 3, "pytorch-lightning_version": "2.0"}, folder / "a.ckpt")
    transform = _plain(SIDE, SIDE, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return Made(f"ssl:{folder / 'a.ckpt'}", lambda images: model(transform(images)))


@entry("ssl: ViT of DINO")
def _(folder: Path) -> Made:
    folder.mkdir(parents=True, exist_ok=True)
    student, teacher = (
        away_from_defaults(timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL_VIT)) for _ in range(2)
    )
    networks = {
        "student": {f"module.backbone.{name}": tensor for name, tensor in student.state_dict().items()},
        "teacher": {f"backbone.{name}": tensor for name, tensor in teacher.state_dict().items()},
    }
    torch.save({**networks, "epoch": 3}, folder / "checkpoint.pth")
    transform = _plain(SIDE, round(SIDE * 8 / 7), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Made(f"ssl:{folder / 'checkpoint.pth'}?heads=2", lambda images: teacher(transform(images)))
