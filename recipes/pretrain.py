"""Pre-train a small ResNet without labels, by any of thirteen methods (zepad_mm.pretraining).

Methods: barlow_twins, byol, dino, moco_v2_plus, moco_v3, nnclr, ressl, simclr, supcon (with labels), swav, vibcreg,
vicreg, w_mse; lightly's losses and heads where it has them, two views of full size for all.

What it is for: the unimodal story needs three encoders of different methods, seeds and data (a public victim, a public
auxiliary one, and a benign one that no attacker ever saw). Any timm ResNet serves; the shipped configs use one of
1.25 M parameters at 32 pixels that a single CPU thread trains in ten minutes.

Run first: ``pip install 'zepad-mm[ssl]'``, and have a data set that ``zepad_mm.data.load_data`` reads (a Hub name, a
folder of parquet files, or class folders).

    CPU        python recipes/pretrain.py --config recipes/configs/ssl_resnet/pretrain_victim.yaml
    one GPU    accelerate launch --num_processes 1 recipes/pretrain.py --config ... --mixed_precision bf16
    8 GPUs     accelerate launch --multi_gpu --num_processes 8 recipes/pretrain.py --config ... --num_processes 8
    2 nodes    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                   recipes/pretrain.py --config ... --num_processes 16

``batch_size`` is per process. A killed run goes on from its last whole epoch when started again with the same ``out``.
Writes ``out/encoder/`` (timm's format: ``load_encoder("timm:local-dir:OUT/encoder")``), ``metrics.jsonl``,
``pretrain.json``, and ``state.safetensors`` while it runs.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from zepad_mm.data import LabelledImages, load_data
from zepad_mm.pretraining import (
    METHODS,
    Learner,
    MethodSettings,
    augment,
    load_state,
    make_learner,
    probe,
    save_encoder,
    save_state,
)
from zepad_mm.training import make_accelerator
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance
from zepad_mm.utils.seeding import seeded, seeded_generator

SMALL_RESNET = {"channels": [32, 64, 128, 256], "layers": [1, 1, 1, 1], "zero_init_last": False}


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """Pre-training of one encoder."""

    data: str  # Hub name, folder of parquet files or of class folders, or "embedded"
    out: str  # folder for the encoder and its records
    method: str = "simclr"  # a name of zepad_mm.pretraining.METHODS
    split: str = "train"  # split of the data
    part: Literal["all", "first_half", "second_half"] = "all"  # of the split, in file order
    held_out: float = 0.1  # last share of the part, never trained on; kNN and linear accuracy are measured there
    n: int | None = None  # use that many images only
    arch: str = "resnet18"  # a timm architecture
    arch_args: dict[str, Any] = field(default_factory=lambda: dict(SMALL_RESNET))  # for timm.create_model
    image_size: int = 32  # side in pixels
    epochs: int = 12
    batch_size: int = 128  # per process
    lr: float = 2e-3  # peak rate of AdamW, after one epoch of warm-up, then cosine to 0
    weight_decay: float = 1e-4
    min_scale: float = 0.25  # smallest share of the picture that a random crop keeps
    seed: int = 0
    threads: int | None = None  # torch threads on the CPU; None leaves the default
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    num_processes: int | None = None  # refuse to run with another number of processes

    def __post_init__(self) -> None:
        super().__post_init__()
        METHODS.get(self.method)


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
    learner = make_learner(config.method, encoder.to(memory_format=torch.channels_last), config, world)
    if world > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(learner)
    learner.to(device)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    return learner, torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)


def train_epoch(
    config: Settings,
    epoch: int,
    train: LabelledImages,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> torch.Tensor:
    """One pass over this process's share of the pictures; the sum of its losses."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    learner, steps = accelerator.unwrap_model(wrapped), len(train) // (config.batch_size * world)
    order = torch.randperm(len(train), generator=seeded_generator(config.seed * 1000 + epoch))
    draws = seeded_generator((config.seed * 1000 + epoch) * 1000 + rank)
    total = torch.zeros((), device=device)
    for step in tqdm(range(steps), f"epoch {epoch + 1}/{config.epochs}", disable=rank > 0, mininterval=5):
        fall = (1 + math.cos(math.pi * (epoch * steps + step) / (config.epochs * steps))) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (epoch * steps + step + 1) / steps) * fall
        start = (step * world + rank) * config.batch_size
        rows = order[start : start + config.batch_size]
        images, labels = (part[rows].to(device) for part in (train.images, train.labels))
        view = augment(images, config.min_scale, draws)
        other = augment(images, config.min_scale, draws, colours=not learner.weak_second_view)
        with seeded(device, config.seed, "forward", epoch, step, rank):
            loss = wrapped(view, other, labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        learner.after_step(1 - (1 - config.momentum) * fall)
        total += loss.detach()
    return total


def run(config: Settings) -> dict[str, Any]:
    """Pre-train, save and probe one encoder; returns what pretrain.json holds."""
    started = time.time()
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config.num_processes, config.mixed_precision)
    world, main = accelerator.num_processes, accelerator.is_main_process
    torch.manual_seed(config.seed)
    train, held_out = load_parts(config)
    steps = len(train) // (config.batch_size * world)
    if steps == 0:
        raise ValueError(f"{len(train)} images are fewer than one batch of {config.batch_size} x {world} processes")
    learner, optimizer = build(config, accelerator.device, world)
    out, done = Path(config.out), 0
    state = out / "state.safetensors"
    if state.is_file():
        done = load_state(state, learner, optimizer, asdict(config))
        accelerator.print(f"going on after epoch {done} of {config.epochs}")
    wrapped, optimizer = accelerator.prepare(learner, optimizer)
    learner = accelerator.unwrap_model(wrapped)

    for epoch in range(done, config.epochs):
        begun = time.time()
        total = train_epoch(config, epoch, train, wrapped, optimizer, accelerator)
        mean_loss = float(accelerator.reduce(total, "mean")) / steps
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss became {mean_loss} in epoch {epoch + 1}; lower --lr")
        if main:
            save_state(state, learner, optimizer, epoch + 1, asdict(config))
            row = {"epoch": epoch + 1, "loss": mean_loss, "seconds": time.time() - begun}
            if (epoch + 1) % 4 == 0 or epoch + 1 == config.epochs:
                row |= probe(learner, train, held_out, accelerator.device)
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
    accelerator.wait_for_everyone()
    if not main:
        return {}
    save_encoder(learner.encoder, out / "encoder", config.arch_args)
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


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return run(Settings.from_cli(arguments))


if __name__ == "__main__":
    main()
