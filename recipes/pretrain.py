"""Pre-train a small ResNet without labels, by any of thirteen methods (zepad_mm.pretraining).

Methods: barlow_twins, byol, dino, moco_v2_plus, moco_v3, nnclr, ressl, simclr, supcon (with labels), swav, vibcreg,
vicreg, w_mse. All use two views of full size, and lightly's losses and heads where it has them.

Purpose: the study of SSL encoders needs a victim and an auxiliary encoder, both public, and a benign one that no
attacker knows, of different methods, seeds and data. Any timm ResNet works; the configs use one of 1.25 M parameters at
32 pixels that a single CPU thread trains in ten minutes.

Run first: ``pip install 'zepad-mm[ssl]'``, and have a dataset that ``zepad_mm.data.load_data`` reads (a Hub name, a
folder of parquet files, or class folders).

    CPU        python recipes/pretrain.py --config recipes/configs/ssl_resnet/pretrain_victim.yaml
    one GPU    accelerate launch --num_processes 1 recipes/pretrain.py --config ... --mixed_precision bf16
    8 GPUs     accelerate launch --multi_gpu --num_processes 8 recipes/pretrain.py --config ...
    2 nodes    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                   recipes/pretrain.py --config ...

``batch_size`` is per process. A killed run resumes after its last complete epoch when it is started again with the same
``out``. Writes ``out/encoder/`` (timm's format: ``load_encoder("timm:local-dir:OUT/encoder")``), ``metrics.jsonl``,
``pretrain.json``, and ``state.safetensors`` while it runs.

``initial`` is an encoder whose weights training continues from; it is probed before the first step too. ``more_data``
joins further images to those of ``data``, on which alone the probes are made.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from accelerate import Accelerator
from torch import nn

from zepad_mm.data import LabelledImages, joined, load_data
from zepad_mm.data.loading import dataset_name
from zepad_mm.encoders import load_encoder
from zepad_mm.encoders.state_dict import load_state_dict_strict
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
from zepad_mm.utils.distributed import claim_together
from zepad_mm.utils.io import append_line, keep_lines, write_json
from zepad_mm.utils.progress import Progress, say
from zepad_mm.utils.provenance import provenance
from zepad_mm.utils.seeding import seeded, seeded_generator
from zepad_mm.utils.stopping import run_program

log = logging.getLogger("zepad_mm.pretrain")
PROBE_EVERY = 4  # epochs
SMALL_RESNET = {"channels": [32, 64, 128, 256], "layers": [1, 1, 1, 1], "zero_init_last": False}


@dataclass(frozen=True, kw_only=True)
class Settings(MethodSettings):
    """Settings of recipes/pretrain.py."""

    data: str  # Hub name, folder of parquet files or class folders, or "embedded"
    out: str  # folder of the result
    method: str = "simclr"  # a name of zepad_mm.pretraining.METHODS
    split: str = "train"  # split of the data
    part: Literal["all", "first_half", "second_half"] = "all"  # part of the split, in file order
    held_out: float = 0.1  # last share of the part, not trained on, for kNN and linear accuracy
    n: int | None = None  # number of images; None: all
    more_data: list[str] = field(default_factory=list)  # further data sets to train on, whole
    initial: str | None = None  # source of an encoder of the same arch to start from; None: random weights
    arch: str = "resnet18"  # a timm architecture
    arch_args: dict[str, Any] = field(default_factory=lambda: dict(SMALL_RESNET))  # arguments of timm.create_model
    image_size: int = 32  # side in pixels
    epochs: int = 12
    batch_size: int = 128  # per process
    lr: float = 2e-3  # peak learning rate of AdamW: one epoch of warm-up, then cosine to 0
    weight_decay: float = 1e-4
    bn_mode: Literal["eval", "train"] = "train"  # eval: the encoder keeps and uses its running statistics
    min_scale: float = 0.25  # smallest share of the image in a random crop
    seed: int = 0
    threads: int | None = None  # torch threads on the CPU; None: torch's default
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None  # None: what accelerate launch says, else "no"
    num_processes: int | None = None  # number of processes expected; another number is an error

    def __post_init__(self) -> None:
        super().__post_init__()
        METHODS.get(self.method)


def pretrain(config: Settings) -> dict[str, Any]:
    """Pre-train, save and probe one encoder; returns the content of pretrain.json, empty on other processes."""
    started = time.time()
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config.num_processes, config.mixed_precision)
    with claim_together(config.out, accelerator):
        return _pretrain(config, accelerator, started)


def _pretrain(config: Settings, accelerator: Accelerator, started: float) -> dict[str, Any]:
    world = accelerator.num_processes
    torch.manual_seed(config.seed)
    labelled, held_out = load_splits(config)
    train = with_more(config, labelled)
    steps = len(train) // (config.batch_size * world)
    if steps == 0:
        raise ValueError(f"{len(train)} images are fewer than one batch of {config.batch_size} x {world} processes")
    learner, optimizer = build(config, accelerator.device, world)
    out, first_epoch = Path(config.out), 0
    state = out / "state.safetensors"
    if state.is_file():
        first_epoch = load_state(state, learner, optimizer, asdict(config))
        say(log, "resuming after epoch %d of %d", first_epoch, config.epochs)
    metrics_file = out / "metrics.jsonl"
    if accelerator.is_main_process:
        keep_lines(metrics_file, lambda line: line["epoch"] <= first_epoch)
    wrapped, optimizer = accelerator.prepare(learner, optimizer)
    learner = accelerator.unwrap_model(wrapped)
    found: dict[str, float] = {}
    if config.initial is not None and first_epoch == 0 and accelerator.is_main_process:
        before = probe(learner, labelled, held_out, accelerator.device)
        keep_lines(metrics_file, lambda line: False)
        append_line(metrics_file, json.dumps({"epoch": 0, **before}))
        say(log, "before training: %s", before)

    bar = Progress(
        total=steps * config.epochs,
        initial=steps * first_epoch,
        desc=f"pre-training by {config.method}",
        unit="step",
        mininterval=5,
        disable=not accelerator.is_main_process,
    )
    for epoch in range(first_epoch, config.epochs):
        epoch_started = time.time()
        total = train_epoch(config, epoch, train, wrapped, optimizer, accelerator, bar)
        mean_loss = float(accelerator.reduce(total, "mean")) / steps
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss became {mean_loss} in epoch {epoch + 1}; lower --lr")
        if accelerator.is_main_process:
            metrics = {"epoch": epoch + 1, "loss": mean_loss, "seconds": time.time() - epoch_started}
            if (epoch + 1) % PROBE_EVERY == 0 or epoch + 1 == config.epochs:
                found = probe(learner, labelled, held_out, accelerator.device)
                metrics |= found
            # the row first: a run killed in between trains this epoch again and drops the row, but loses none
            append_line(metrics_file, json.dumps(metrics))
            say(log, "epoch %d of %d: loss %.4f", epoch + 1, config.epochs, mean_loss)
            save_state(state, learner, optimizer, epoch + 1, asdict(config))
    bar.close()
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    save_encoder(learner.encoder, out / "encoder", config.arch_args)
    report = {
        **provenance(seed=config.seed, config=asdict(config) | _without_folders(config, labelled.name)),
        "n_train": len(train),
        "n_held_out": len(held_out),
        **({"before": _first_probe(metrics_file)} if config.initial is not None else {}),
        **(found or probe(learner, labelled, held_out, accelerator.device)),
        "parameters": sum(parameter.numel() for parameter in learner.encoder.parameters()),
        "processes": world,
        "wall_s": round(time.time() - started, 1),
    }
    write_json(out / "pretrain.json", report)
    state.unlink()
    print(json.dumps(report, indent=2))
    return report


def load_splits(config: Settings) -> tuple[LabelledImages, LabelledImages]:
    """Training and held-out images of the configured part of the split, in file order."""
    data = load_data(config.data, config.split, config.image_size, labelled=False)
    half = len(data) // 2
    start, stop = {"all": (0, len(data)), "first_half": (0, half), "second_half": (half, len(data))}[config.part]
    if set(data.labels[:half].tolist()) != set(data.labels[half:].tolist()) and config.part != "all":
        raise ValueError(f"{config.data}: its halves have different classes; shuffle it if it is sorted by class")
    if config.n is not None:
        stop = min(stop, start + config.n)
    border = stop - max(1, int(config.held_out * (stop - start)))
    return data.subset(torch.arange(start, border)), data.subset(torch.arange(border, stop))


def with_more(config: Settings, images: LabelledImages) -> LabelledImages:
    """The images and those of ``more_data``."""
    if not config.more_data:
        return images
    more = [load_data(source, config.split, config.image_size, labelled=False) for source in config.more_data]
    return joined([images, *more])


def _without_folders(config: Settings, data: str) -> dict[str, Any]:
    """What the record says in the place of folders of this machine."""
    last = {"out": Path(config.out).name, "more_data": [dataset_name(source) for source in config.more_data]}
    initial = config.initial and config.initial[: config.initial.rfind(":") + 1] + Path(config.initial).name
    return {"data": data, "initial": initial, **last}


def _first_probe(metrics_file: Path) -> dict[str, float]:
    """The probe before the first step."""
    first = json.loads(metrics_file.read_text(encoding="utf-8").splitlines()[0])
    return {name: first[name] for name in ("knn_accuracy", "linear_accuracy")}


def build(config: Settings, device: torch.device, world: int) -> tuple[Learner, torch.optim.Optimizer]:
    """A new learner and its optimiser on the device. Raises ValueError for initial weights of another architecture."""
    size = (3, config.image_size, config.image_size)
    overlay: dict[str, Any] = {"input_size": size, "crop_mode": "squash", "crop_pct": 1.0}
    initial = load_encoder(config.initial) if config.initial is not None else None
    if initial is not None:
        overlay |= {"mean": initial.preprocess.mean, "std": initial.preprocess.std}
    encoder = timm.create_model(config.arch, num_classes=0, pretrained_cfg_overlay=overlay, **config.arch_args)
    if initial is not None:
        hint = f"it is no {config.arch} with arch_args={config.arch_args}; write the --arch and --arch_args that it has"
        load_state_dict_strict(encoder.state_dict(), initial.backbone.state_dict(), str(config.initial), hint)
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
    bar: Progress | None = None,
) -> torch.Tensor:
    """Train on this process's share of the images for one epoch, with a step of ``bar`` for each; returns the sum of
    its losses."""
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    learner, steps = accelerator.unwrap_model(wrapped), len(train) // (config.batch_size * world)
    order = torch.randperm(len(train), generator=seeded_generator(config.seed * 1000 + epoch))
    view_generator = seeded_generator((config.seed * 1000 + epoch) * 1000 + rank)
    total = torch.zeros((), device=device)
    if config.bn_mode == "eval":
        learner.keep_statistics()
    for step in range(steps):
        decay = (1 + math.cos(math.pi * (epoch * steps + step) / (config.epochs * steps))) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (epoch * steps + step + 1) / steps) * decay
        start = (step * world + rank) * config.batch_size
        rows = order[start : start + config.batch_size]
        images, labels = train.images[rows].to(device), train.labels[rows].to(device)
        view_a = augment(images, config.min_scale, view_generator)
        view_b = augment(images, config.min_scale, view_generator, colours=not learner.weak_second_view)
        with seeded(device, config.seed, "forward", epoch, step, rank):
            loss = wrapped(view_a, view_b, labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        learner.after_step(1 - (1 - config.momentum) * decay)
        total += loss.detach()
        if bar is not None:
            bar.update()
    return total


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Pre-train with the settings of a command line."""
    return pretrain(Settings.from_cli(arguments))


if __name__ == "__main__":
    sys.exit(run_program(main))
