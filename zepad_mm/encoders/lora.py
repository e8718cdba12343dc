"""Low-rank adaptation of any encoder through peft: plain adapters that peft alone can load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zepad_mm.encoders.attention import unfuse_attention
from zepad_mm.encoders.base import Encoder, feature_dim_of
from zepad_mm.encoders.shared_trunk import blocks_of
from zepad_mm.encoders.state_dict import load_state_dict_strict
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import read_tensors


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Config):
    """Settings of a LoRA adapter."""

    rank: int = 8  # r: inner width of each adapter
    alpha: float = 16.0  # the delta is multiplied by alpha / rank
    dropout: float = 0.0  # on the adapter's input, while training
    targets: tuple[str, ...] = ()  # names of modules to adapt, as in peft; empty: every dense Linear and convolution
    first_block: int = 0  # with empty targets: leave the stem and all blocks before this one as they are, to be shared


def lora_targets(encoder: Encoder, first_block: int = 0) -> list[str]:
    """Full names of the layers that LoRA can adapt exactly, found by what they are, not by what they are called.

    Linears, and convolutions over all channels. Left out: depthwise convolutions (a low-rank factor of a 1-channel
    filter saves nothing), convolutions that pad inside their own forward, whose adapter would see another size, and
    layers whose weight the network reads without calling them: an adapter there would do nothing until it is merged.
    """

    def adaptable(layer: nn.Module) -> bool:
        if isinstance(layer, nn.Conv2d):
            pads_itself = type(layer) is not nn.Conv2d and layer.kernel_size != (1, 1)
            return layer.groups == 1 and not pads_itself
        return isinstance(layer, nn.Linear)

    called = _called(encoder)
    if first_block:
        blocks = blocks_of(encoder.backbone)
        if not 0 < first_block < len(blocks):
            raise ValueError(f"first_block: expected 0 to {len(blocks) - 1} for {encoder.source}, got {first_block}")
        called = called[called.index(blocks[first_block]) :]
    reached = set(called)
    return [name for name, layer in encoder.backbone.named_modules() if adaptable(layer) and layer in reached]


def _called(encoder: Encoder) -> list[nn.Module]:
    """The modules of the backbone in the order in which one forward pass comes to them."""
    seen: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen.append(module))
        for module in encoder.backbone.modules()
    ]
    try:
        feature_dim_of(encoder.backbone, encoder.preprocess.image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def add_lora(encoder: Encoder, settings: LoraSettings | None = None) -> Encoder:
    """Put a LoRA adapter into ``encoder`` in place: only the adapter trains, the first output is unchanged.

    Raises:
        ValueError: the encoder has an adapter already, no target matched, or one whose weight is read past the adapter.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer

    settings = settings or LoraSettings()
    if isinstance(encoder.backbone, PeftModel):
        raise ValueError(f"{encoder.source} has a LoRA adapter already; merge it first with merge_lora(encoder)")
    unfuse_attention(encoder.backbone)
    targets = list(settings.targets) or lora_targets(encoder, settings.first_block)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # declared int, used as a number
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias="none",
    )
    adapted: Any = get_peft_model(encoder.backbone, config)  # type: ignore[arg-type]
    # peft writes null for modules that are not transformers'; the file should name the adapted encoder
    adapted.peft_config["default"].base_model_name_or_path = encoder.source
    encoder.backbone = adapted
    if settings.targets:
        called = set(_called(encoder))
        idle = [name for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer) and layer not in called]
        if idle:
            raise ValueError(
                f"{encoder.source} reads the weights of {', '.join(idle[:3])} without calling the layer, so an adapter "
                "there would do nothing; leave LoraSettings.targets empty to adapt every layer that can be"
            )
    return encoder


@dataclass(frozen=True)
class ParameterCount:
    """How much of a module trains; prints as one line."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({self.trainable / max(1, self.total):.2%})"


def count_parameters(module: nn.Module) -> ParameterCount:
    """The parameters of a module, each counted once however often it is shared."""
    parameters = list(module.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCount(trainable, sum(parameter.numel() for parameter in parameters))


def load_lora(encoder: Encoder, folder: str | Path, trainable: bool = False) -> Encoder:
    """Put the adapter saved in ``folder`` (``adapter_config.json`` + safetensors) into ``encoder``, in place.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a damaged adapter, or one of another encoder.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError

    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; expected a LoRA adapter in peft's layout")
    unfuse_attention(encoder.backbone)
    try:
        encoder.backbone = PeftModel.from_pretrained(encoder.backbone, str(folder), is_trainable=trainable)
    except (SafetensorError, RuntimeError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the adapter in {folder} does not fit {encoder.source}: {first_line}") from error
    own = get_peft_model_state_dict(encoder.backbone, save_embedding_layers=False)
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    load_state_dict_strict(own, tensors, f"the adapter in {folder}", f"it does not fit {encoder.source}")
    return encoder.eval()


def has_lora(encoder: Encoder) -> bool:
    """Whether the encoder carries an adapter."""
    from peft import PeftModel

    return isinstance(encoder.backbone, PeftModel)


def merge_lora(encoder: Encoder) -> Encoder:
    """Fold the adapter into the weights, W + alpha/r * B A, and drop it; no-op without one.

    The merged weights are the encoder's own afterwards: others that shared them (``SharedTrunk``) keep theirs.
    """
    from peft.tuners.lora import LoraLayer

    if has_lora(encoder):
        backbone: Any = encoder.backbone
        for layer in backbone.modules():
            if isinstance(layer, LoraLayer):
                base: Any = layer.get_base_layer()
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
        encoder.backbone = backbone.merge_and_unload()
    return encoder


@contextmanager
def folded_lora(encoder: Encoder) -> Iterator[None]:
    """Within, the adapter is part of the weights and each layer is one product again, as attacks want it.

    No gradient reaches the adapter meanwhile. Afterwards the very same weights are back, to the bit. Under autocast
    the folded weights have its precision already, so that no step casts them again. No-op without an adapter.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = []
    if has_lora(encoder):
        layers = [layer for layer in encoder.backbone.modules() if isinstance(layer, LoraLayer)]
        layers = [layer for layer in layers if not layer.merged and not layer.disable_adapters]
    kept = [layer.get_base_layer().weight for layer in layers]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                kind = weight.device.type
                whole = weight + sum(layer.get_delta_weight(name) for name in layer.active_adapters)
                whole = whole.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)
                layer.get_base_layer().weight = nn.Parameter(whole, requires_grad=False)
                layer._disable_adapters = True
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.get_base_layer().weight = weight
            layer._disable_adapters = False
