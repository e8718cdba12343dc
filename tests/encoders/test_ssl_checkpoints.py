"""Checkpoints of SSL methods in the layouts of the code that wrote them, read back exactly."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50
from torchvision.models.resnet import BasicBlock, ResNet

from zepad_mm.encoders import load_encoder
from zepad_mm.encoders.ssl_checkpoints import CIFAR, IMAGENET

pl = pytest.importorskip("pytorch_lightning")
lightly = pytest.importorskip("lightly")
import timm  # noqa: E402
from lightly.models import ResNetGenerator  # noqa: E402
from lightly.models import modules as parts  # noqa: E402
from lightly.models.utils import deactivate_requires_grad  # noqa: E402

SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


@dataclass
class Written:
    """A checkpoint by a library, its backbone in memory, and the options it needs."""

    content: Any
    backbone: nn.Module
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    query: str = ""
    image_size: int = 224
    left_out: str = ""  # must be named in the log


def small_resnet(num_classes: int = 10) -> ResNet:
    """torchvision's ResNet with one block in each stage."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes)


def with_batch_statistics(module: nn.Module) -> Any:
    """Set batch statistics off their neutral start; return the module in eval mode."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    return module.eval()


def headless(network: Any) -> Any:
    network.fc = nn.Identity()
    return with_batch_statistics(network)


def features_of(network: Any) -> Any:
    """Return a copy of the network without its classifier."""
    network = copy.deepcopy(network)
    network.fc = nn.Identity()
    return network


def cifar(network: Any, padding: int) -> Any:
    """Change a torchvision ResNet as solo-learn's BaseMethod (padding 2) or W-MSE's code (padding 1)."""
    network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=padding, bias=False)
    network.maxpool = nn.Identity()
    return headless(network)


class Module(pl.LightningModule):
    """Return a LightningModule of named parts, as the examples of lightly and the methods of solo-learn."""

    def __init__(self, **named: nn.Module) -> None:
        super().__init__()
        for name, part in named.items():
            setattr(self, name, part)


def lightning(**named: nn.Module) -> dict[str, Any]:
    """Return what Lightning's trainer saves of a module."""
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(Module(**named))
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def sequential(network: nn.Module, pooled: bool = True) -> nn.Sequential:
    """Cut off the classifier as lightly's examples do: ``nn.Sequential(*list(resnet.children())[:-1])``."""
    return nn.Sequential(*list(network.children())[:-1], *([] if pooled else [nn.AdaptiveAvgPool2d(1)]))


def lightly_simclr() -> Written:
    """The first ReLU of lightly's ResNet is not a child module, so the cut network lacks it."""
    backbone = with_batch_statistics(sequential(ResNetGenerator("resnet-9"), pooled=False))
    content = lightning(backbone=backbone, projection_head=parts.SimCLRProjectionHead(512, 512, 128))
    return Written(content, backbone, image_size=32, left_out="state_dict.projection_head.layers (12)")


def lightly_moco() -> Written:
    backbone = with_batch_statistics(sequential(small_resnet()))
    momentum = with_batch_statistics(copy.deepcopy(backbone))
    deactivate_requires_grad(momentum)
    heads = {name: parts.MoCoProjectionHead(512, 512, 128) for name in ("projection_head", "projection_head_momentum")}
    content = lightning(backbone=backbone, backbone_momentum=momentum, **heads)
    return Written(content, backbone, left_out="state_dict.backbone_momentum (72)")


def lightly_moco_momentum() -> Written:
    torch.manual_seed(0)
    written = lightly_moco()
    momentum = sequential(small_resnet())
    prefix = "state_dict.backbone_momentum."
    state = written.content["state_dict"]
    momentum.load_state_dict({k[18:]: v for k, v in state.items() if f"state_dict.{k}".startswith(prefix)})
    return Written(written.content, momentum.eval(), query="network=momentum", left_out="state_dict.backbone (")


def lightly_named() -> Written:
    network = with_batch_statistics(ResNetGenerator("resnet-9"))
    network.linear = nn.Identity()
    content = {**network.state_dict(), "linear.weight": torch.zeros(10, 512)}
    return Written(content, network, CIFAR, image_size=32, left_out="linear (1)")


def lightly_dino() -> Written:
    student, teacher = (timm.create_model("vit_tiny_patch16_224", **SMALL_VIT) for _ in range(2))
    heads = {name: parts.DINOProjectionHead(32, 32, 16, 64) for name in ("student_head", "teacher_head")}
    content = lightning(student_backbone=student, teacher_backbone=teacher.eval(), **heads)
    return Written(content, teacher, query="heads=2", image_size=32, left_out="state_dict.student_backbone")


def lightly_torchvision_vit() -> Written:
    from torchvision.models import VisionTransformer

    network = VisionTransformer(32, 8, 2, 2, 32, 48)
    network.heads = nn.Identity()
    content = parts.MaskedVisionTransformerTorchvision(vit=network.eval()).state_dict()
    return Written(content, network, query="heads=2", image_size=32, left_out="mask_token")


def lightly_timm_mae() -> Written:
    network = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT).eval()
    backbone = parts.MaskedVisionTransformerTIMM(vit=network)
    decoder = parts.MAEDecoderTIMM(16, 8, embed_dim=32, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    content = lightning(backbone=backbone, decoder=decoder)
    return Written(content, network, query="heads=2", image_size=32, left_out="state_dict.decoder.decoder_blocks")


def solo_learn() -> Written:
    backbone, momentum = cifar(resnet18(), 2), cifar(resnet18(), 2)
    named = {"backbone": backbone, "momentum_backbone": momentum, "classifier": nn.Linear(512, 10)}
    content = lightning(**named, projector=nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 8)))
    return Written(content, backbone, CIFAR, image_size=32, left_out="state_dict.momentum_backbone")


def solo_learn_resnet50_imagenet() -> Written:
    backbone = headless(resnet50())
    return Written(lightning(backbone=backbone, projector=nn.Linear(2048, 8)), backbone, left_out="projector")


def wmse() -> Written:
    backbone = cifar(small_resnet(), 1)
    model = nn.ModuleDict({"model": backbone, "head": nn.Linear(512, 8)})
    return Written(model.state_dict(), backbone, CIFAR, image_size=32, left_out="head (2)")


def moco_v2() -> Written:
    query, key = small_resnet(num_classes=16), small_resnet(num_classes=16)
    for encoder in (query, key):
        encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)
    model = nn.ModuleDict({"encoder_q": with_batch_statistics(query), "encoder_k": with_batch_statistics(key)})
    model.register_buffer("queue", torch.zeros(16, 32))
    state = nn.DataParallel(model).state_dict()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sum(0 * p.sum() for p in model.parameters()).backward()
    optimizer.step()
    backbone = features_of(query)
    content = {"epoch": 200, "arch": "resnet10", "state_dict": state, "optimizer": optimizer.state_dict()}
    return Written(content, backbone, left_out="state_dict.module.queue (1)")


def moco_v3_vit() -> Written:
    vits = [
        timm.create_model("vit_small_patch16_224", img_size=32, patch_size=8, depth=1, num_heads=12, num_classes=8)
        for _ in range(2)
    ]
    model = nn.ModuleDict({"base_encoder": vits[0], "momentum_encoder": vits[1]})
    content = {"state_dict": nn.DataParallel(model).state_dict(), "args": argparse.Namespace(arch="vit_small")}
    backbone = copy.deepcopy(vits[0]).eval()
    backbone.reset_classifier(0)
    return Written(content, backbone, image_size=32, left_out="state_dict.module.momentum_encoder")


def simclr() -> Written:
    """A PyTorch SimCLR with its MLP in place of the classifier; trained on pixels without normalisation."""
    network = with_batch_statistics(small_resnet())
    network.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    content = {"epoch": 1, "state_dict": nn.ModuleDict({"backbone": network}).state_dict()}
    raw = ((0.0,) * 3, (1.0,) * 3)
    backbone = features_of(network)
    return Written(content, backbone, raw, "mean=0,0,0&std=1,1,1", left_out="state_dict.backbone.fc")


def byol() -> Written:
    online, target = with_batch_statistics(small_resnet()), with_batch_statistics(small_resnet())
    nets = {
        name: nn.ModuleDict({"net": net, "projector": nn.Linear(512, 8)})
        for name, net in (("online_encoder", online), ("target_encoder", target))
    }
    content = nn.ModuleDict({**nets, "online_predictor": nn.Linear(8, 8)}).state_dict()
    return Written(content, features_of(online), left_out="online_predictor")


def dino() -> Written:
    student, teacher = (
        nn.ModuleDict(
            {"backbone": timm.create_model("vit_tiny_patch16_224", **SMALL_VIT), "head": nn.Linear(32, 8)}
        ).eval()
        for _ in range(2)
    )
    content = {
        "student": nn.DataParallel(student).state_dict(),
        "teacher": teacher.state_dict(),
        "args": argparse.Namespace(arch="vit_tiny", patch_size=8),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    return Written(content, teacher["backbone"], query="heads=2", image_size=32, left_out="dino_loss.center (1)")


def dino_resnet_student() -> Written:
    student, teacher = headless(small_resnet()), headless(small_resnet())
    content = {
        "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()},
    }
    return Written(content, student, query="network=online", left_out="teacher.backbone")


def swav() -> Written:
    network = headless(small_resnet())
    heads = {"projection_head": nn.Linear(512, 8), "prototypes": nn.Linear(8, 30, bias=False)}
    state = {f"module.{k}": v for k, v in [*network.state_dict().items(), *nn.ModuleDict(heads).state_dict().items()]}
    return Written({"state_dict": state}, network, left_out="state_dict.module.prototypes (1)")


def supcon() -> Written:
    network = with_batch_statistics(ResNetGenerator("resnet-9"))
    network.linear = nn.Identity()
    state = {f"encoder.{k}": v for k, v in network.state_dict().items()} | {"head.0.weight": torch.zeros(8, 512)}
    content = {"opt": argparse.Namespace(epochs=1), "model": state, "epoch": 1}
    return Written(content, network, CIFAR, image_size=32, left_out="model.head")


def barlow_twins() -> Written:
    network = headless(resnet34())
    model = nn.ModuleDict({"backbone": network, "projector": nn.Linear(512, 8), "bn": nn.BatchNorm1d(8)})
    content = {"epoch": 1, "model": nn.DataParallel(model).state_dict()}
    return Written(content, network, left_out="model.module.bn")


def torchvision_plain() -> Written:
    network = with_batch_statistics(resnet50())
    return Written(network.state_dict(), features_of(network), left_out="fc (2)")


def timm_plain() -> Written:
    network = with_batch_statistics(timm.create_model("resnet34", num_classes=0))
    return Written(network.state_dict(), network, left_out="nothing")


LAYOUTS: list[Callable[[], Written]] = [
    lightly_simclr,
    lightly_moco,
    lightly_moco_momentum,
    lightly_named,
    lightly_dino,
    lightly_torchvision_vit,
    lightly_timm_mae,
    solo_learn,
    solo_learn_resnet50_imagenet,
    wmse,
    moco_v2,
    moco_v3_vit,
    simclr,
    byol,
    dino,
    dino_resnet_student,
    swav,
    supcon,
    barlow_twins,
    torchvision_plain,
    timm_plain,
]


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_ssl_checkpoint_layout_is_recognised(
    write: Callable[[], Written], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    written = write()
    path = tmp_path / "checkpoint.pth"
    torch.save(written.content, path)
    encoder = load_encoder(f"ssl:{path}{f'?{written.query}' if written.query else ''}")
    assert encoder.preprocess.image_size == written.image_size
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in written.statistics)
    assert (encoder.preprocess.mean, encoder.preprocess.std) == written.statistics
    with torch.no_grad():
        expected = written.backbone((images - mean) / std).flatten(1)
        got = encoder.backbone((images - mean) / std)
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, atol=1e-5, rtol=1e-5)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "zepad_mm.encoders.ssl_checkpoints"]
    assert written.left_out in line.split("left out: ")[1]


# ---- options and errors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small ResNet with a 3x3 stem in torchvision's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ssl") / "small.safetensors"
    save_file(cifar(small_resnet(), 1).state_dict(), path)
    return path


@pytest.mark.parametrize("stem", ["3x3p1", "3x3p2", "3x3p1pool"])
def test_ssl_checkpoint_stem_option(small: Path, stem: str) -> None:
    backbone: Any = load_encoder(f"ssl:{small}?stem={stem}").backbone
    assert backbone.conv1.padding == (int(stem[4]),) * 2
    assert isinstance(backbone.maxpool, nn.Identity) != stem.endswith("pool")


def test_ssl_checkpoint_reads_sidecar_options(small: Path, tmp_path: Path) -> None:
    path = tmp_path / small.name
    path.write_bytes(small.read_bytes())
    sidecar = tmp_path / f"{small.name}.json"
    sidecar.write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "stem": "3x3p2"}))
    encoder = load_encoder(f"ssl:{path}?std=1,1,1&image_size=48&resize_mode=squash&interpolation=bicubic")
    backbone: Any = encoder.backbone
    assert encoder.preprocess.mean == (0.1, 0.2, 0.3)
    assert encoder.preprocess.std == (1.0, 1.0, 1.0)
    assert (encoder.preprocess.image_size, encoder.preprocess.resize_mode) == (48, "squash")
    assert backbone.conv1.padding == (2, 2)
    sidecar.write_text(json.dumps({"maen": [0.1, 0.2, 0.3]}))
    with pytest.raises(ValueError, match="no key 'maen'; did you mean 'mean'"):
        load_encoder(f"ssl:{path}")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("stme=3x3p1", "no key 'stme'; did you mean 'stem'"),
        ("stem=7x7", "a stem of 3x3; expected 7x7 or 3x3, and stem=... to agree"),
        ("stem=5x5", "stem: expected one of 7x7"),
        ("network=both", "network: expected one of online, momentum"),
        ("network=momentum", "0 networks for network=momentum"),
        ("prefix=encoder", "0 networks for prefix=encoder"),
        ("mean=a,b,c", "could not convert"),
        ("mean=0.5", "three numbers"),
        ("mean", "expected ssl:PATH"),
    ],
)
def test_ssl_checkpoint_rejects_wrong_options(small: Path, query: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_encoder(f"ssl:{small}?{query}")


def test_ssl_checkpoint_without_weights_builds_architecture(small: Path) -> None:
    a, b = (load_encoder(f"ssl:{small}", pretrained=flag).state_dict() for flag in (True, False))
    assert {key: value.shape for key, value in a.items()} == {key: value.shape for key, value in b.items()}
    assert not torch.equal(a["backbone.conv1.weight"], b["backbone.conv1.weight"])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran')",))


def test_ssl_checkpoint_names_damaged_and_foreign_files(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    good = cifar(small_resnet(), 1).state_dict()

    def expect(content: Any, message: str, error: type[Exception] = ValueError) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(error, match=message):
            load_encoder(f"ssl:{path}")

    with pytest.raises(FileNotFoundError, match="does not exist; expected a checkpoint"):
        load_encoder(f"ssl:{tmp_path / 'none.pth'}")
    expect({k: v for k, v in good.items() if k != "layer3.0.bn2.bias"}, r"lacks layer3\.0\.bn2\.bias")
    expect({**good, "layer1.0.se.weight": torch.zeros(1)}, r"has the unknown layer1\.0\.se\.weight")
    expect({**good, "layer4.0.bn2.bias": torch.zeros(9)}, r"layer4\.0\.bn2\.bias \(9,\) instead of \(512,\)")
    expect({k: v for k, v in good.items() if k != "conv1.weight"}, "deep stems are unknown")
    expect({"epoch": 3}, "holds no named tensors")
    expect({"a.b.weight": torch.zeros(1)}, r"no backbone that is known here; .* it holds a")
    expect({"state_dict": good, "callback": Evil()}, "holds more than tensors, and unpickling it could run any code")
    expect(pickle.dumps(Evil()), "holds more than tensors|damaged")
    expect(b"PK\x03\x04 and nothing more", "damaged or no checkpoint")
    torch.save(good, path)
    expect(path.read_bytes()[:100_000], "damaged or no checkpoint")
    twice = {f"{name}.{key}": value for name in ("a", "b") for key, value in good.items()}
    expect(twice, r"2 networks .* 'a\.' \(ResNet, online\), 'b\.' \(ResNet, online\)")
    torch.save(twice, path)
    assert load_encoder(f"ssl:{path}?prefix=b").feature_dim == 512
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(small.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_encoder(f"ssl:{cut}")
