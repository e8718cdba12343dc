"""Checkpoints of self-supervised learning, as solo-learn, lightly, the methods' own code and torchvision write them.

``ssl:PATH`` finds the backbone in the file, whatever stands before its names (``backbone.``, ``module.encoder_q.``,
``student.module.backbone.`` ...), and builds it from the shapes of its weights: ResNets (torchvision's and lightly's
names, 7x7 or 3x3 stem) and ViTs (timm's and DINO's names, or torchvision's). What the weights do not determine has a
default, which is logged, and can be given behind a ``?`` or in a file ``PATH.json`` with the same keys::

    ssl:PATH?stem=3x3p1&mean=0.49,0.48,0.45&std=0.25,0.24,0.26&network=momentum

Defaults: a 3x3 stem means CIFAR (32 pixels, CIFAR-10's mean and std; ImageNet's for lightly, whose transforms use them
everywhere), all else ImageNet (224 pixels, or the size of a ViT's position embedding, cut from the centre of 8/7 of
that, as these methods are evaluated). A 3x3 stem pads by 2 in
solo-learn's Lightning checkpoints and by 1 elsewhere. Of an online and a momentum network the online one is taken,
of student and teacher (DINO) the teacher, as their authors evaluate them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

from zepad_mm.encoders.base import Encoder, Preprocess, feature_dim_of
from zepad_mm.encoders.image_size import resize_tower
from zepad_mm.encoders.sources import Source, check_image_size
from zepad_mm.encoders.ssl_networks import MOMENTUM, ONLINE, Network, find_networks
from zepad_mm.encoders.state_dict import load_state_dict_strict, read_foreign, summary
from zepad_mm.utils.config import Config
from zepad_mm.utils.images import Interpolation, ResizeMode
from zepad_mm.utils.io import read_json

log = logging.getLogger(__name__)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Config):
    """What a checkpoint does not contain, or what overrides a default; None is the default."""

    mean: tuple[float, ...] | None = None  # per channel, of pixels in [0, 1]; 0,0,0 with std 1,1,1: not normalised
    std: tuple[float, ...] | None = None  # per channel
    image_size: int | None = None  # side in pixels
    resize_size: int | None = None  # side before the centre is cropped
    interpolation: Interpolation = "bilinear"  # of the resize
    resize_mode: ResizeMode = "shortest"
    stem: Literal["7x7", "3x3p1", "3x3p2", "3x3p1pool", "3x3p2pool"] | None = None  # of ResNets; pool: with max pooling
    network: Literal["online", "momentum"] | None = None  # student, encoder_q, backbone; or teacher, encoder_k, target
    prefix: str | None = None  # what stands before the backbone's names in the file, where several could be meant
    heads: int | None = None  # attention heads of a ViT; default one for every 64 channels (12 in MoCo v3's ViT-S)


def load(source: Source, pretrained: bool) -> Encoder:
    """As :meth:`EncoderBackend.load`."""
    path, options = Path(source.name), _options(source)
    tensors = read_foreign(path)
    networks = find_networks(tensors)
    network = _choose(networks, options, path, summary(tensors))
    built = network.build(options.stem, options.heads, str(path))
    if pretrained:
        where = f"{path}: the {network.family} under {network.prefix!r}"
        hint = "it is damaged or of a kind unknown here"
        # torch fills this counter in where an old checkpoint has none; nothing in eval mode reads it
        optional = ("num_batches_tracked",)
        load_state_dict_strict(built.backbone.state_dict(), network.tensors, where, hint, optional=optional)
    mean, std = CIFAR if built.small and network.layout != "lightly" else IMAGENET
    side = check_image_size(options.image_size or built.image_size)
    if side != built.image_size:
        resize_tower(built.backbone, side)
    preprocess = Preprocess(
        image_size=side,
        mean=options.mean or mean,
        std=options.std or std,
        interpolation=options.interpolation,
        resize_mode=options.resize_mode,
        resize_size=options.resize_size or (side if built.small else round(side * 8 / 7)),
        centre="round",
    )
    left = [name for name in tensors if name not in network.names.values()]
    log.warning(
        "ssl:%s: %d tensors under %r as %s (%s, %s network); %s; left out: %s",
        path,
        len(network.names),
        network.prefix,
        built.description,
        network.layout,
        network.role,
        f"mean {preprocess.mean}, std {preprocess.std}, {preprocess.image_size} pixels",
        summary(left, [other.prefix for other in networks if other is not network]),
    )
    built.backbone.eval()
    width = feature_dim_of(built.backbone, preprocess.image_size)
    return Encoder(built.backbone, preprocess, width, str(source)).eval()


def _options(source: Source) -> CheckpointOptions:
    """The options of a checkpoint: from the source string, else from the sidecar ``PATH.json``, key by key."""
    sidecar = Path(f"{source.name}.json")
    values: dict[str, Any] = {}
    if sidecar.is_file():
        values = CheckpointOptions.from_dict(read_json(sidecar)).to_dict()
    try:
        pairs = parse_qsl(source.options, keep_blank_values=True, strict_parsing=bool(source.options))
        values |= {key: _value(key, text) for key, text in pairs}
    except ValueError as error:
        raise ValueError(f"{source}: {error}; expected ssl:PATH?KEY=VALUE&KEY=VALUE") from error
    try:
        return CheckpointOptions.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _value(key: str, text: str) -> Any:
    if key in ("mean", "std"):
        return [float(part) for part in text.split(",")]
    return int(text) if key in ("image_size", "resize_size", "heads") else text


def _choose(networks: list[Network], options: CheckpointOptions, path: Path, content: str) -> Network:
    """The network that the options select. Raises ValueError with a list unless there is exactly one."""
    if not networks:
        raise ValueError(
            f"{path} holds no backbone that is known here; expected a ResNet (layer1.0.conv1.weight ...) or a ViT "
            f"(blocks.0.attn.qkv.weight ...); it holds {content[:300]}"
        )
    there = ", ".join(f"{network.prefix!r} ({network.family}, {network.role})" for network in networks)
    chosen = networks
    if options.prefix is not None:
        chosen = [network for network in networks if network.prefix.rstrip(".") == options.prefix.rstrip(".")]
    elif len({network.role for network in networks}) > 1 or options.network:
        teacher = any("teacher" in network.prefix for network in networks)
        role = options.network or (MOMENTUM if teacher else ONLINE)
        chosen = [network for network in networks if network.role == role]
    if len(chosen) == 1:
        return chosen[0]
    asked = f"prefix={options.prefix}" if options.prefix is not None else f"network={options.network or 'online'}"
    raise ValueError(f"{path} has {len(chosen)} networks for {asked}; choose one with ?prefix=PREFIX of: {there}")
