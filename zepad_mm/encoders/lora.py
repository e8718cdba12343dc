"""Low-rank adaptation of any encoder through peft: plain adapters that peft alone can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zepad_mm.config import Config
from zepad_mm.encoders.attention import unfuse_attention
from zepad_mm.encoders.base import Encoder, feature_dim_of


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Config):
    """How an encoder is adapted."""

    rank: int = 8  # r: inner width of each adapter
    alpha: float = 16.0  # the delta is multiplied by alpha / rank
    dropout: float = 0.0  # on the adapter's input, while training
    targets: tuple[str, ...] = ()  # names of modules to adapt, as in peft; empty: every dense Linear and convolution


def lora_targets(encoder: Encoder) -> list[str]:
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
    return [name for name, layer in encoder.backbone.named_modules() if adaptable(layer) and layer in called]


def _called(encoder: Encoder) -> set[nn.Module]:
    """The modules of the backbone that one forward pass goes through."""
    seen: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: seen.add(module))
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
    targets = list(settings.targets) or lora_targets(encoder)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # declared int, used as a number
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias="none",
    )
    adapted: Any = get_peft_model(encoder.backbone, config)  # type: ignore[arg-type]
    # peft writes null for modules that are not transformers'; the file shall say what it adapts
    adapted.peft_config["default"].base_model_name_or_path = encoder.source
    encoder.backbone = adapted
    if settings.targets:
        called = _called(encoder)
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
    """Put the adapter saved in ``folder`` (``adapter_config.json`` + safetensors) into ``encoder``, in place."""
    from peft import PeftModel
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
    return encoder.eval()


def has_lora(encoder: Encoder) -> bool:
    """Whether the encoder carries an adapter."""
    from peft import PeftModel

    return isinstance(encoder.backbone, PeftModel)


def merge_lora(encoder: Encoder) -> Encoder:
    """Fold the adapter into the weights, W + alpha/r * B A, and drop it; no-op without one."""
    if has_lora(encoder):
        backbone: Any = encoder.backbone
        encoder.backbone = backbone.merge_and_unload()
    return encoder
