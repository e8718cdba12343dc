"""Networks in a checkpoint, found by the names of its tensors and rebuilt from their shapes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from zepad_mm.utils.isolation import import_isolated

ONLINE, MOMENTUM = "online", "momentum"
NETWORKS = (ONLINE, MOMENTUM)
MOST_NETWORKS = 50  # in one file; the names of all tensors are read again for each
STEMS = ("7x7", "3x3p1", "3x3p2", "3x3p1pool", "3x3p2pool")
# parts of a name that mark the momentum network, a moving average of the online one
MOMENTUM_PREFIX = re.compile(r"momentum|teacher|target|(^|[._])(ema|encoder_k|key_encoder|k_encoder)([._]|$)")


@dataclass(frozen=True)
class Built:
    """A built backbone with its description and image size."""

    backbone: nn.Module  # normalised pixels to features (B, D)
    description: str  # for the log, e.g. "resnet18, stem 3x3p2"
    image_size: int  # side in pixels that it was most likely trained on
    small: bool = False  # made for small images as CIFAR's


@dataclass(frozen=True)
class Network:
    """One backbone inside a checkpoint."""

    prefix: str  # prefix of its names in the file
    family: str  # "ResNet", "ViT" or "torchvision ViT"
    layout: str  # naming scheme: "solo-learn", "lightly" or "plain"
    names: dict[str, str] = field(repr=False)  # name in the backbone -> name in the file
    tensors: dict[str, Tensor] = field(repr=False)  # by names of the backbone
    bare: bool = False  # a ResNet without the ReLU behind its first convolution

    @property
    def role(self) -> str:
        """Online, or momentum: the moving average of the online network."""
        return MOMENTUM if MOMENTUM_PREFIX.search(self.prefix) else ONLINE

    def build(self, stem: str | None, heads: int | None, where: str) -> Built:
        """The architecture derived from the shapes, randomly initialised. Raises ValueError for an unknown one."""
        if self.family == "ResNet":
            return _resnet(self, stem, where)
        if stem:
            raise ValueError(f"{where} holds a {self.family}; stem={stem} is for ResNets")
        return _vit(self, heads, where) if self.family == "ViT" else _torchvision_vit(self, heads, where)


# parts of a backbone, as opposed to heads that lie beside them under the same prefix
RESNET_PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
VIT_PARTS = (
    *("patch_embed", "cls_token", "pos_embed", "blocks", "norm", "norm_pre", "fc_norm", "reg_token"),
    *("register_tokens", "dist_token", "rel_pos_bias", "attn_pool"),
)
TORCHVISION_VIT_PARTS = ("conv_proj", "class_token", "encoder")
FIRST = {
    "ResNet": ("layer1.0.conv1.weight", RESNET_PARTS),
    "ViT": ("blocks.0.attn.qkv.weight", VIT_PARTS),
    "torchvision ViT": ("encoder.layers.encoder_layer_0.ln_1.weight", TORCHVISION_VIT_PARTS),
}


def find_networks(tensors: dict[str, Tensor]) -> list[Network]:
    """Every backbone in a flat table of tensors (:func:`zepad_mm.encoders.state_dict.read_foreign`).

    Raises ValueError for more than ``MOST_NETWORKS``.
    """
    found = []
    for family, (first, parts) in FIRST.items():
        prefixes = [name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")]
        for prefix in _few(prefixes):
            inside = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
            names = {key: full for key, full in inside.items() if key.split(".")[0] in parts}
            found.append(_network(prefix, family, names, tensors))
    for prefix in _few([name.removesuffix("0.weight") for name in tensors if _is_numbered_stem(name, tensors)]):
        numbered = _numbered_resnet(prefix, tensors)
        if numbered:
            # convolution, norm, and at once the first stage: the children of lightly's own ResNet, whose first ReLU
            # is not a child, so the network that lightly's examples train has none
            bare = numbered["layer1.0.conv1.weight"] == f"{prefix}2.0.conv1.weight"
            found.append(replace(_network(prefix, "ResNet", numbered, tensors), bare=bare))
    return found


def _few(prefixes: list[str]) -> list[str]:
    """The prefixes in order. Raises ValueError where there are too many: each costs a pass over all names."""
    if len(prefixes) > MOST_NETWORKS:
        raise ValueError(
            f"the checkpoint seems to hold {len(prefixes)} networks, {prefixes[0]!r:.100} first; expected at most "
            f"{MOST_NETWORKS}: save the one that you want by itself"
        )
    return sorted(prefixes)


def _network(prefix: str, family: str, names: dict[str, str], tensors: dict[str, Tensor]) -> Network:
    theirs = any(".shortcut." in name for name in names)  # lightly's (and SupCon's) word for torchvision's downsample
    numbered = family == "ResNet" and f"{prefix}conv1.weight" not in tensors
    layout = "plain"
    if numbered:
        layout = "lightly"
    elif re.fullmatch(r"state_dict\.(momentum_)?(backbone|encoder)\.", prefix) and not theirs:  # as Lightning saves it
        layout = "solo-learn"
    names = {name.replace(".shortcut.", ".downsample."): full for name, full in names.items()}
    return Network(prefix, family, layout, names, {name: tensors[full] for name, full in names.items()})


def _is_numbered_stem(name: str, tensors: dict[str, Tensor]) -> bool:
    """Whether a tensor is the first convolution of a network with numbered parts, which a norm follows."""
    prefix, stem = name.removesuffix("0.weight"), tensors[name]
    begins = prefix != name and (not prefix or prefix.endswith("."))
    return begins and stem.ndim == 4 and stem.shape[1] == 3 and f"{prefix}1.running_mean" in tensors


def _numbered_resnet(prefix: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Names of a ResNet that was cut into ``nn.Sequential(*children)``, as lightly's examples do; {} if it is none."""
    blocks = re.compile(rf"{re.escape(prefix)}(\d+)\.0\.conv1\.weight")
    stages = sorted({int(match[1]) for match in map(blocks.fullmatch, tensors) if match})
    if len(stages) != 4:
        return {}
    parts = {"0": "conv1", "1": "bn1"} | {str(stage): f"layer{index}" for index, stage in enumerate(stages, 1)}
    inside = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    split = {name: name.split(".", 1) for name in inside}
    return {
        f"{parts[pieces[0]]}.{pieces[1]}": inside[name]
        for name, pieces in split.items()
        if len(pieces) == 2 and pieces[0] in parts
    }


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """How many blocks there are. Raises ValueError where their numbers leave one out."""
    found = {match[1] for match in (re.match(pattern, name) for name in tensors) if match}
    missing = next((str(number) for number in range(len(found)) if str(number) not in found), None)
    if missing is not None:
        last = max(found, key=lambda number: (len(number), number))
        raise ValueError(
            f"the checkpoint holds {len(found)} blocks, one of them number {last[:20]}, and no block {missing}"
        )
    return len(found)


def _resnet(network: Network, stem: str | None, where: str) -> Built:
    resnet = import_isolated("torchvision.models.resnet")
    tensors = network.tensors
    if "conv1.weight" not in tensors:
        raise ValueError(
            f"{where}: the ResNet under {network.prefix!r} has no conv1.weight; deep stems are unknown here"
        )
    layers = [_count(tensors, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    bottleneck = "layer1.0.conv3.weight" in tensors
    block: Any = resnet.Bottleneck if bottleneck else resnet.BasicBlock
    groups, width = 1, 64
    if bottleneck:
        middle = tensors["layer1.0.conv2.weight"]
        groups = middle.shape[0] // middle.shape[1]
        width = middle.shape[0] // groups
    backbone = resnet.ResNet(block, layers, groups=groups, width_per_group=width)
    backbone.fc = nn.Identity()  # type: ignore[assignment]
    kernel = tensors["conv1.weight"].shape[-1]
    stem_name = stem or {7: "7x7", 3: "3x3p2" if network.layout == "solo-learn" else "3x3p1"}.get(kernel, "")
    if not stem_name.startswith(f"{kernel}x{kernel}"):
        raise ValueError(f"{where} has a stem of {kernel}x{kernel}; expected 7x7 or 3x3, and stem=... to agree with it")
    if kernel == 3:
        outputs = tensors["conv1.weight"].shape[0]
        backbone.conv1 = nn.Conv2d(3, outputs, 3, stride=1, padding=int(stem_name[4]), bias=False)
        if not stem_name.endswith("pool"):
            backbone.maxpool = nn.Identity()  # type: ignore[assignment]
    if network.bare:
        backbone.relu = nn.Identity()  # type: ignore[assignment]
        stem_name += ", no ReLU there"
    known = {
        (False, (2, 2, 2, 2)): "resnet18",
        (False, (3, 4, 6, 3)): "resnet34",
        (True, (3, 4, 6, 3)): "resnet50",
        (True, (3, 4, 23, 3)): "resnet101",
        (True, (3, 8, 36, 3)): "resnet152",
    }
    name = known.get((bottleneck, (layers[0], layers[1], layers[2], layers[3])), f"ResNet of {layers} blocks")
    wide = f", {groups} groups of {width}" if (groups, width) != (1, 64) else ""
    small = kernel == 3
    return Built(backbone, f"{name}{wide}, stem {stem_name}", 32 if small else 224, small)


def _heads(width: int, heads: int | None, network: Network, where: str) -> int:
    # MoCo v3 alone gives its ViT-S twelve heads of 32 channels
    moco_v3 = width == 384 and re.search(r"(^|\.)(base|momentum)_encoder\.$", network.prefix)
    heads = heads or (12 if moco_v3 else max(1, width // 64))
    if width % heads:
        raise ValueError(f"{where}: {heads} heads do not divide {width} channels; write ?heads=N")
    return heads


def _side(positions: int, patch: int, where: str) -> int:
    grid = math.isqrt(positions)
    if grid * grid != positions:
        raise ValueError(
            f"{where}: {positions} position embeddings do not form a square; only square images are supported"
        )
    return grid * patch


def _vit(network: Network, heads: int | None, where: str) -> Built:
    from timm.models.vision_transformer import VisionTransformer

    tensors = network.tensors
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    if any(name not in tensors for name in needed):
        raise ValueError(f"{where}: the ViT under {network.prefix!r} lacks one of {', '.join(needed)}")
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth, hidden = _count(tensors, r"blocks\.(\d+)\."), tensors["blocks.0.mlp.fc1.weight"].shape[0]
    token = "cls_token" in tensors
    side = _side(tensors["pos_embed"].shape[1] - token, patch, where)
    heads = _heads(width, heads, network, where)
    backbone = VisionTransformer(
        img_size=side,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / width,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        init_values=1.0 if "blocks.0.ls1.gamma" in tensors else None,
        class_token=token,
        global_pool="avg" if "fc_norm.weight" in tensors or not token else "token",
        fc_norm="fc_norm.weight" in tensors,
        final_norm="norm.weight" in tensors,
        num_classes=0,
    )
    return Built(backbone, f"ViT of {depth} blocks, {width} channels, {heads} heads, patches of {patch}", side)


def _torchvision_vit(network: Network, heads: int | None, where: str) -> Built:
    tensors = network.tensors
    if "conv_proj.weight" not in tensors:
        raise ValueError(
            f"{where}: the ViT under {network.prefix!r} has no conv_proj.weight; conv stems are unknown here"
        )
    width, _, patch, _ = tensors["conv_proj.weight"].shape
    depth = _count(tensors, r"encoder\.layers\.encoder_layer_(\d+)\.")
    side = _side(tensors["encoder.pos_embedding"].shape[1] - 1, patch, where)
    heads = _heads(width, heads, network, where)
    hidden = tensors["encoder.layers.encoder_layer_0.mlp.0.weight"].shape[0]
    backbone = import_isolated("torchvision.models").VisionTransformer(side, patch, depth, heads, width, hidden)
    backbone.heads = nn.Identity()
    return Built(backbone, f"ViT of {depth} blocks, {width} channels, {heads} heads, patches of {patch}", side)
