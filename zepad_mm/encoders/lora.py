"""Low-rank adaptation of any encoder through peft: plain adapters that peft alone can load."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zepad_mm.encoders.adapter_configs import clean_adapter_config
from zepad_mm.encoders.attention import unfuse_attention
from zepad_mm.encoders.base import Encoder, feature_dim_of
from zepad_mm.encoders.build_limits import BuildLimit, check_memory_of
from zepad_mm.encoders.library_configs import WRONG_CONFIG, read_config
from zepad_mm.encoders.shared_trunk import blocks_of
from zepad_mm.encoders.sources import BACKENDS, FOLDER, HUB, parse_source
from zepad_mm.encoders.state_dict import load_state_dict_strict
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import read_tensors
from zepad_mm.utils.isolation import preserved_process_state
from zepad_mm.utils.seeding import seeded_generator
from zepad_mm.utils.wrappers import unwrap

WEIGHTS = "adapter_model.safetensors"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name, as peft writes a model of the Hub
SAME, SAME_HALF = 1e-3, 5e-2  # features with the adapter beside and inside the weights, relative to the largest


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Config):
    """Settings of a LoRA adapter."""

    rank: int = 8  # r: inner width of each adapter
    alpha: float = 16.0  # the delta is multiplied by alpha / rank
    dropout: float = 0.0  # on the adapter's input, while training
    targets: tuple[str, ...] = ()  # names of modules to adapt, as in peft; empty: every dense Linear and convolution
    first_block: int = 0  # with empty targets: leave the stem and all blocks before this one as they are, to be shared

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.targets, str):
            one = "() for every layer" if self.targets == "all-linear" else f"({self.targets!r},)"
            raise ValueError(f"targets: expected a list of names, got the string {self.targets!r}; write {one}")
        sizes = self.rank >= 1 and self.first_block >= 0
        if not sizes or not 0 < self.alpha < float("inf") or not 0 <= self.dropout < 1:
            raise ValueError(
                "LoRA: expected rank of at least 1, alpha above 0, dropout in [0, 1), first_block of at least 0; got "
                f"rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}, first_block {self.first_block}"
            )


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
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    settings = settings or LoraSettings()
    if has_lora(encoder):
        raise ValueError(f"{encoder.source} has a LoRA adapter already; merge it first with merge_lora(encoder)")
    unfuse_attention(encoder.backbone)
    targets: list[str] | str = list(settings.targets) or lora_targets(encoder, settings.first_block)
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


@preserved_process_state()
def load_lora(encoder: Encoder, folder: str | Path, trainable: bool = False) -> Encoder:
    """Put the adapter saved in ``folder`` (``adapter_config.json`` + safetensors) into ``encoder``, in place.

    Raises:
        FileNotFoundError: a file is missing. ValueError: the encoder has an adapter already, or the saved one is
            damaged, of another encoder, of a kind that cannot be merged exactly, or does not fit in name, shape or
            type. The encoder is then as it was, but for the projections of its attention, which are separate.
    """
    from peft import PeftModel, get_peft_model_state_dict

    folder = Path(folder)
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; expected a LoRA adapter in peft's layout")
    if has_lora(encoder):
        raise ValueError(f"{encoder.source} has a LoRA adapter already; merge it first with merge_lora(encoder)")
    where, hint = f"the adapter in {folder}", f"it does not fit {encoder.source}"
    tensors = check_memory_of(read_tensors(folder / WEIGHTS)[0], where)
    values = clean_adapter_config(read_config(folder / "adapter_config.json"), tensors, str(folder))
    _check_base(values.pop("base_model_name_or_path", None), encoder, where)
    base = encoder.backbone
    unfuse_attention(base)
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    try:
        with BuildLimit(where, [folder / WEIGHTS]):
            adapted: Any = PeftModel(base, _lora_config(values, encoder.source, trainable))
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        load_state_dict_strict(own, tensors, where, hint)
        encoder.backbone = adapted
        encoder.eval()
        _check_merging(encoder, where)
    except (RuntimeError, ValueError, *WRONG_CONFIG) as error:
        encoder.backbone = _without_adapter(base)
        for parameter in trained:
            parameter.requires_grad_(True)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        text = first_line if where in first_line else f"{where} does not fit {encoder.source}: {first_line}"
        raise ValueError(text) from error
    return encoder


def _lora_config(values: dict[str, Any], source: str, trainable: bool) -> Any:
    from peft import LoraConfig

    config = LoraConfig(**values, inference_mode=not trainable)
    config.base_model_name_or_path = source
    return config


def _check_base(name: Any, encoder: Encoder, where: str) -> None:
    """Raise ValueError where the adapter names the encoder that it was trained on, and it is another one.

    Folders and checkpoints of one machine have other names on the next, and a name on the Hub may be the folder of its
    cache: only sources that both mean a public model can be told apart. peft itself writes ``owner/name``.
    """
    if not name or name == encoder.source:
        return
    theirs, ours = _public_name(str(name)), _public_name(encoder.source)
    if REPOSITORY.fullmatch(str(name)):
        theirs, ours = str(name), _repository(encoder.source)
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"{where} was trained on {str(name)[:100]}, and this encoder is {encoder.source}; where both are the same "
            "model, change base_model_name_or_path in its adapter_config.json"
        )


def _public_name(source: str) -> str:
    """What a source calls a public model, without revision; empty for folders and files."""
    try:
        parsed = parse_source(source)
    except ValueError:
        return ""
    local = (
        parsed.place == FOLDER or parsed.weights or parsed.kind not in BACKENDS or BACKENDS.get(parsed.kind).reads_file
    )
    return "" if local else f"{parsed.kind}:{parsed.place}:{parsed.name}"


def _repository(source: str) -> str:
    """The repository on the Hub that a source names; empty where it names none."""
    try:
        parsed = parse_source(source)
    except ValueError:
        return ""
    by_name = not parsed.place and parsed.kind in BACKENDS and BACKENDS.get(parsed.kind).names_are_repositories
    return parsed.name if (parsed.place == HUB or by_name) and not parsed.weights else ""


def _without_adapter(module: nn.Module) -> nn.Module:
    """The module with every adapted layer replaced by its base layer, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
    return module


@torch.no_grad()
def _check_merging(encoder: Encoder, where: str) -> None:
    """Raise ValueError unless the encoder answers the same with the adapter beside and inside its weights."""
    size, like = encoder.preprocess.image_size, next(encoder.parameters())
    image = torch.rand(1, 3, size, size, generator=seeded_generator(0)).to(like.device, like.dtype)
    plain = encoder(image)
    if not bool(plain.isfinite().all()):
        raise ValueError(f"{where} gives features that are not finite; it is damaged")
    with folded_lora(encoder):
        folded = encoder(image)
    gap = float((plain - folded).abs().max() / plain.abs().max().clamp_min(1e-12))
    tolerance = SAME if like.dtype == torch.float32 else SAME_HALF
    if not gap <= tolerance:
        raise ValueError(
            f"{where} cannot be merged exactly: features differ by {gap:.1e} of the largest. A layer that it adapts is "
            "read without being called, or its kind of adapter is unknown here"
        )


def has_lora(encoder: Encoder) -> bool:
    """Whether the encoder carries an adapter, however its backbone is wrapped."""
    return any(True for _ in _lora_layers(encoder))


def _lora_layers(encoder: Encoder) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [layer for layer in encoder.backbone.modules() if isinstance(layer, LoraLayer)]


def check_saved_adapter(encoder: Encoder) -> None:
    """Raise ValueError unless the adapter is the only one and in use: of several, a folder of ours holds one."""
    for layer in _lora_layers(encoder):
        names, active = sorted(layer.scaling), list(layer.active_adapters)
        if names != ["default"] or active != names or layer.disable_adapters:
            used = "none" if layer.disable_adapters else ", ".join(active)
            raise ValueError(
                f"{encoder.source} has the adapters {', '.join(names)}, of which it uses {used}; only one named "
                "default that is in use can be saved: delete the others, enable it, or merge with merge_lora(encoder)"
            )


def merge_lora(encoder: Encoder) -> Encoder:
    """Fold the adapter into the weights, W + alpha/r * B A, and drop it; no-op without one.

    The merged weights are the encoder's own afterwards: others that shared them (``SharedTrunk``) keep theirs.
    """
    if has_lora(encoder):
        backbone: Any = unwrap(encoder.backbone)
        for layer in _lora_layers(encoder):
            _own_weights(layer.get_base_layer())
        encoder.backbone = backbone.merge_and_unload()
    return encoder


def _own_weights(base: Any) -> None:
    """Give a layer copies of its weight and bias, which a merge changes in place."""
    for name in ("weight", "bias"):
        tensor = getattr(base, name, None)
        if tensor is not None:
            setattr(base, name, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))


@contextmanager
def folded_lora(encoder: Encoder) -> Iterator[None]:
    """Within, the adapter is part of the weights and each layer is one product again, as attacks want it.

    No gradient reaches the adapter meanwhile. Afterwards the very same weights are back, to the bit. Under autocast
    the folded weights have its precision already, so that no step casts them again. No-op without an adapter.
    """
    layers = [layer for layer in _lora_layers(encoder) if not layer.merged and not layer.disable_adapters]
    kept = [(layer.get_base_layer().weight, layer.get_base_layer().bias) for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                base = layer.get_base_layer()
                _own_weights(base)
                layer.merge(adapter_names=list(layer.active_adapters))
                layer.merged_adapters.clear()
                layer._disable_adapters = True
                kind = base.weight.device.type
                if torch.is_autocast_enabled(kind):
                    base.weight.data = base.weight.data.to(torch.get_autocast_dtype(kind))
                base.weight.requires_grad_(False)
        yield
    finally:
        for layer, (weight, bias) in zip(layers, kept, strict=True):
            layer.get_base_layer().weight, layer.get_base_layer().bias = weight, bias
            layer.merged_adapters.clear()
            layer._disable_adapters = False
