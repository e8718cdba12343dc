"""Pre-train a small ResNet without labels: SimCLR, BYOL, VICReg or Barlow Twins, with lightly's losses and heads.

What it is for: the unimodal story needs three encoders of different methods, seeds and data (a public victim, a public
auxiliary one, and a benign one that no attacker ever saw). Any timm ResNet serves; the shipped configs use one of
1.25 M parameters at 32 pixels that a single CPU thread trains in ten minutes.

Run first: ``pip install 'zepad-mm[ssl]'``, and have a data set that ``zepad_mm.data.load_data`` reads (a Hub name, a
folder of parquet files, or class folders).

    CPU        python recipes/pretrain_ssl.py --config recipes/configs/pretrain_ssl_victim.yaml --data uoft-cs/cifar10
    one GPU    accelerate launch --num_processes 1 recipes/pretrain_ssl.py --config ... --mixed_precision bf16
    8 GPUs     accelerate launch --multi_gpu --num_processes 8 recipes/pretrain_ssl.py --config ... --num_processes 8
    2 nodes    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                   recipes/pretrain_ssl.py --config ... --num_processes 16

``batch_size`` is per process. A killed run goes on from its last whole epoch when started again with the same ``out``.
Writes ``out/encoder/`` (timm's format: ``load_encoder("timm:local-dir:OUT/encoder")``), ``metrics.jsonl``,
``pretrain.json``, and ``state.safetensors`` while it runs.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightly import loss as losses
from lightly.models.modules import heads
from lightly.models.utils import update_momentum
from torch import Tensor, nn
from tqdm import tqdm

from zepad_mm.data import LabelledImages, load_data
from zepad_mm.files import read_tensors, write_json, write_tensors
from zepad_mm.provenance import provenance
from zepad_mm.training import make_accelerator

METHODS = ("simclr", "byol", "vicreg", "barlow_twins")
PARTS = ("all", "first_half", "second_half")
SMALL_RESNET = {"channels": [32, 64, 128, 256], "layers": [1, 1, 1, 1], "zero_init_last": False}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Pre-training of one encoder."""

    data: str  # Hub name, folder of parquet files or of class folders, or "embedded"
    out: str  # folder for the encoder and its records
    method: str = "simclr"  # simclr, byol, vicreg or barlow_twins
    split: str = "train"  # split of the data
    part: str = "all"  # all, first_half (public) or second_half (the defender's own) of the split, in file order
    held_out: float = 0.1  # last share of the part, never trained on; kNN and linear accuracy are measured there
    n: int | None = None  # use that many images only
    arch: str = "resnet18"  # a timm architecture
    arch_args: dict[str, Any] = field(default_factory=lambda: dict(SMALL_RESNET))  # for timm.create_model
    image_size: int = 32  # side in pixels
    epochs: int = 12
    batch_size: int = 128  # per process
    lr: float = 2e-3  # peak rate of AdamW, after one epoch of warm-up, then cosine to 0
    weight_decay: float = 1e-4
    temperature: float = 0.2  # of NT-Xent
    momentum: float = 0.98  # of BYOL's target; rises to 1
    hidden_dim: int = 512  # of the projection head
    projection_dim: int = 128
    min_scale: float = 0.25  # smallest share of the picture that a random crop keeps
    seed: int = 0
    threads: int | None = None  # torch threads on the CPU; None leaves the default
    mixed_precision: str = "no"  # no, bf16 or fp16
    num_processes: int | None = None  # refuse to run with another number of processes

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.part not in PARTS:
            raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {self.part!r}")


def augment(images: Tensor, min_scale: float, generator: torch.Generator) -> Tensor:
    """One random view of a batch (B, 3, S, S) in [0, 1]: resized crop, flip, colour jitter, grey; all per sample.

    The crop and the flip are one affine sampling, the colours one 3x3 matrix: a view costs a few milliseconds.
    Parameters are drawn on the CPU, so a seed gives the same views on every device.
    """
    n, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=generator)

    area, ratio = uniform(min_scale, 1).sqrt(), uniform(-math.log(4 / 3), math.log(4 / 3)).div(2).exp()
    width, height = (area * ratio).clamp_max(1), (area / ratio).clamp_max(1)
    left, top = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    affine = torch.zeros(n, 2, 3)
    affine[:, 0, 0], affine[:, 0, 2], affine[:, 1, 1], affine[:, 1, 2] = width * flip, left, height, top
    grid = F.affine_grid(affine.to(device), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)

    grey = torch.tensor([0.299, 0.587, 0.114])
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    jitter = uniform(0, 1) < 0.8
    angle = torch.where(jitter, uniform(-0.2, 0.2) * math.pi, 0.0)
    saturation = torch.where(uniform(0, 1) < 0.2, 0.0, torch.where(jitter, uniform(0.6, 1.4), 1.0))
    turn = torch.eye(3).repeat(n, 1, 1)
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = (
        saturation * value for value in (angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    )
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    contrast = torch.where(jitter, uniform(0.6, 1.4), 1.0).to(device).view(-1, 1, 1)
    bright = torch.where(jitter, uniform(0.6, 1.4), 1.0).to(device).view(-1, 1, 1)
    pixels = matrix.to(device) @ views.flatten(2)
    mean = (grey.to(device) @ pixels).mean(-1).view(-1, 1, 1)
    return (bright * (contrast * (pixels - mean) + mean)).clamp(0, 1).view_as(images)


class Learner(nn.Module):
    """Encoder and projection head; ``forward(view_a, view_b)`` is the loss, so that DDP wraps the whole step."""

    def __init__(self, encoder: nn.Module, config: Settings, processes: int) -> None:
        super().__init__()
        width, gather = encoder.num_features, processes > 1
        self.method, self.encoder = config.method, encoder
        pixel = encoder.pretrained_cfg
        self.register_buffer("mean", torch.tensor(pixel["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixel["std"]).view(1, 3, 1, 1), persistent=False)
        sizes = (config.hidden_dim, config.projection_dim)
        if config.method == "simclr":
            self.projector = heads.SimCLRProjectionHead(width, *sizes)
            self.criterion = losses.NTXentLoss(config.temperature, gather_distributed=gather)
        elif config.method == "byol":
            self.projector = heads.BYOLProjectionHead(width, *sizes)
            self.predictor = heads.BYOLPredictionHead(config.projection_dim, *sizes)
            self.target = copy.deepcopy(nn.Sequential(encoder, self.projector)).requires_grad_(False)
            self.criterion = losses.NegativeCosineSimilarity()
        elif config.method == "vicreg":
            self.projector = heads.VICRegProjectionHead(width, *sizes)
            self.criterion = losses.VICRegLoss(gather_distributed=gather)
        else:
            self.projector = heads.BarlowTwinsProjectionHead(width, *sizes)
            self.criterion = losses.BarlowTwinsLoss(gather_distributed=gather)

    def features(self, images: Tensor) -> Tensor:
        return self.encoder((images - self.mean) / self.std)

    def forward(self, view_a: Tensor, view_b: Tensor) -> Tensor:
        views = (torch.cat([view_a, view_b]) - self.mean) / self.std
        views = views.contiguous(memory_format=torch.channels_last)
        a, b = self.projector(self.encoder(views)).float().chunk(2)
        if self.method != "byol":
            return self.criterion(a, b)
        with torch.no_grad():
            target_a, target_b = self.target(views).float().chunk(2)
        return (self.criterion(self.predictor(a), target_b) + self.criterion(self.predictor(b), target_a)) / 2

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        if self.method == "byol":
            update_momentum(self.encoder, self.target[0], momentum)
            update_momentum(self.projector, self.target[1], momentum)


@torch.no_grad()
def probe(learner: Learner, train: LabelledImages, held_out: LabelledImages, device: torch.device) -> dict[str, float]:
    """Held-out accuracy of a cosine kNN (k = 20, T = 0.07) and of ridge regression on the frozen features."""
    learner.eval()
    sets = [
        (torch.cat([learner.features(x.to(device)).float().cpu() for x, _ in data.batches(500)]), data.labels)
        for data in (train, held_out)
    ]
    learner.train()
    (features, labels), (queries, truth) = sets
    onehot = F.one_hot(labels, len(train.class_names)).float()
    similarity = F.normalize(queries, dim=1) @ F.normalize(features, dim=1).T
    near = similarity.topk(min(20, len(labels)))
    votes = ((near.values / 0.07).exp().unsqueeze(-1) * onehot[near.indices]).sum(1)
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = torch.cat([(features - mean) / std, torch.ones(len(features), 1)], 1)
    asked = torch.cat([(queries - mean) / std, torch.ones(len(queries), 1)], 1)
    gram = inputs.T @ inputs + 1e-3 * len(inputs) * torch.eye(inputs.shape[1])
    linear = asked @ torch.linalg.solve(gram, inputs.T @ onehot)
    return {
        "knn_accuracy": float((votes.argmax(1) == truth).float().mean()),
        "linear_accuracy": float((linear.argmax(1) == truth).float().mean()),
    }


def save_state(path: Path, learner: Learner, optimizer: torch.optim.Optimizer, epoch: int, config: Settings) -> None:
    """Weights and optimiser moments after a whole epoch, as safetensors: nothing is ever pickled."""
    tensors = {f"model.{name}": value for name, value in learner.state_dict().items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entry.items()})
    write_tensors(path, tensors, {"epoch": str(epoch), "config": json.dumps(asdict(config), sort_keys=True)})


def load_state(path: Path, learner: Learner, optimizer: torch.optim.Optimizer, config: Settings) -> int:
    """The number of whole epochs done. Raises ValueError when the state belongs to other settings."""
    tensors, about = read_tensors(path)
    theirs, ours = json.loads(about["config"]), json.loads(json.dumps(asdict(config)))
    other = [key for key in ours if ours[key] != theirs.get(key) and key not in ("out", "data", "threads")]
    if other:
        raise ValueError(f"{path} was written with other settings of {', '.join(other)}; choose a new --out")
    learner.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(about["epoch"])


def save_encoder(encoder: nn.Module, config: Settings, folder: Path) -> None:
    """timm's own format, written beside and renamed: the folder is never half there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch) / "encoder"
        plain = encoder.to(memory_format=torch.contiguous_format)
        timm.models.save_for_hf(plain, str(fresh), model_args=config.arch_args, safe_serialization=True)
        for file in fresh.iterdir():
            file.chmod(0o644)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def load_parts(config: Settings) -> tuple[LabelledImages, LabelledImages]:
    """(train, held out) of the wanted part of the split, in the order of the file."""
    data = load_data(config.data, config.split, config.image_size)
    half = len(data) // 2
    low, high = {"all": (0, len(data)), "first_half": (0, half), "second_half": (half, len(data))}[config.part]
    if set(data.labels[:half].tolist()) != set(data.labels[half:].tolist()) and config.part != "all":
        raise ValueError(f"{config.data}: its halves have other classes, is it sorted by class? Shuffle it first")
    if config.n is not None:
        high = min(high, low + config.n)
    border = high - max(1, int(config.held_out * (high - low)))
    return data.subset(torch.arange(low, border)), data.subset(torch.arange(border, high))


def build(config: Settings, device: torch.device, world: int) -> tuple[Learner, torch.optim.Optimizer]:
    """A fresh learner and its optimiser, on the device."""
    size = (3, config.image_size, config.image_size)
    overlay = {"input_size": size, "crop_mode": "squash", "crop_pct": 1.0}
    encoder = timm.create_model(config.arch, num_classes=0, pretrained_cfg_overlay=overlay, **config.arch_args)
    learner = Learner(encoder.to(memory_format=torch.channels_last), config, world)
    if world > 1 and device.type == "cuda":
        learner = nn.SyncBatchNorm.convert_sync_batchnorm(learner)
    learner.to(device)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    return learner, torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)


def run(config: Settings) -> dict[str, Any]:
    """Pre-train, save and probe one encoder; returns what pretrain.json holds."""
    started = time.time()
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config.num_processes, config.mixed_precision)
    rank, world, main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    torch.manual_seed(config.seed)
    train, held_out = load_parts(config)
    steps = len(train) // (config.batch_size * world)
    if steps == 0:
        raise ValueError(f"{len(train)} images are fewer than one batch of {config.batch_size} x {world} processes")
    learner, optimizer = build(config, accelerator.device, world)
    out, done = Path(config.out), 0
    state = out / "state.safetensors"
    if state.is_file():
        done = load_state(state, learner, optimizer, config)
        accelerator.print(f"going on after epoch {done} of {config.epochs}")
    wrapped, optimizer = accelerator.prepare(learner, optimizer)
    learner = accelerator.unwrap_model(wrapped)

    for epoch in range(done, config.epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed * 1000 + epoch))
        draws = torch.Generator().manual_seed((config.seed * 1000 + epoch) * 1000 + rank)
        total, begun = torch.zeros((), device=accelerator.device), time.time()
        for step in tqdm(range(steps), f"epoch {epoch + 1}/{config.epochs}", disable=not main, mininterval=5):
            progress = (epoch * steps + step) / (config.epochs * steps)
            warm = min(1.0, (epoch * steps + step + 1) / steps)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * warm * (1 + math.cos(math.pi * progress)) / 2
            start = (step * world + rank) * config.batch_size
            images = train.images[order[start : start + config.batch_size]].to(accelerator.device)
            loss = wrapped(augment(images, config.min_scale, draws), augment(images, config.min_scale, draws))
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            learner.after_step(1 - (1 - config.momentum) * (1 + math.cos(math.pi * progress)) / 2)
            total += loss.detach()
        mean_loss = float(accelerator.reduce(total, "mean")) / steps
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss became {mean_loss} in epoch {epoch + 1}; lower --lr")
        if main:
            save_state(state, learner, optimizer, epoch + 1, config)
            row = {"epoch": epoch + 1, "loss": mean_loss, "seconds": time.time() - begun}
            if (epoch + 1) % 4 == 0 or epoch + 1 == config.epochs:
                row |= probe(learner, train, held_out, accelerator.device)
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
    accelerator.wait_for_everyone()
    if not main:
        return {}
    save_encoder(learner.encoder, config, out / "encoder")
    report = {
        **provenance(seed=config.seed, config=asdict(config) | {"data": train.name, "out": out.name}),
        "n_train": len(train),
        "n_held_out": len(held_out),
        **probe(learner, train, held_out, accelerator.device),
        "parameters": sum(parameter.numel() for parameter in learner.encoder.parameters()),
        "processes": world,
        "wall_s": round(time.time() - started, 1),
    }
    write_json(out / "pretrain.json", report)
    state.unlink()
    print(json.dumps(report, indent=2))
    return report


def parse(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line and a ``--config`` file; unknown keys are errors."""
    parser = ArgumentParser(description=__doc__, formatter_class=DefaultHelpFormatter)
    parser.add_argument("--config", action="config", help="YAML file with the settings below")
    parser.add_class_arguments(Settings)
    parsed = parser.parse_args(arguments).as_dict()
    parsed.pop("config")
    return Settings(**parsed)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return run(parse(arguments))


if __name__ == "__main__":
    main()
