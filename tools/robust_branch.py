#!/usr/bin/env python
"""Tune the robust branch of a CLIP by FARE with a constraint on clean images: minutes on one GPU.

    python -m tools.robust_branch --clip FOLDER --images images.parquet --out DIR --minutes 4

FOLDER holds a CLIP in open_clip's format, images.parquet is written by tools/pack_images.py. Every setting is tuned in
a process of its own, on a GPU all at once: one process alone does not fill it. The images stay on the device. DIR gets
``NAME.safetensors`` of each setting (16 bits; a preview of the average of the weights every 30 s, then the result) and
``report.json``, with accuracies on validation images and the choice among the settings. Afterwards

    python -m tools.robust_branch --clip FOLDER --weights DIR/NAME.safetensors --out TUNED

writes the encoder as a tuned folder, which branches are made of; with ``--start WEIGHTS --share 0.5`` half-way between
those weights and the new ones: less robust and closer to the public encoder, or the reverse. Without a GPU tuning takes
hours; --limit makes it a dry run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.pack_images import Packed, mosaics, unpack
from zepad_mm.attacks import PGD, FeatureUAP
from zepad_mm.data import LabelledImages
from zepad_mm.defences import FARE, Student
from zepad_mm.encoders import Encoder, load_clip, load_encoder
from zepad_mm.encoders.state_dict import load_state_dict_strict
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.training import TrainSettings, fit, make_accelerator, write_tuned
from zepad_mm.training.checkpoint import CHECKPOINT
from zepad_mm.training.loop import METRICS, Trainer
from zepad_mm.training.student import build_student
from zepad_mm.utils.io import read_json, read_tensors, write_json, write_tensors
from zepad_mm.utils.seeding import seeded_generator
from zepad_mm.utils.stopping import Stopped

SETTINGS = ("rho=0.05", "rho=0.1", "rho=0.1,soft_label_weight=0.5")
PARSED: dict[str, Callable[[str], Any]] = {"soft_labels": str, "universal_count": int}  # fields that are no floats
LARGEST_LOSS = 0.08  # of clean accuracy on CLEAN_SETS that the chosen setting may have
CLEAN_SETS = ("imagenet20", "caltech69")
EVERY = 30  # seconds between two checkpoints
PROBE = (8, 16)  # steps that warm up, and that are timed to choose the number of steps
LATE = 1.25  # of the minutes, after which a run is ended wherever it is
MEASURED = 400  # validation images of each source


@dataclass(frozen=True)
class Setting:
    """Fields of FARE as ``rho=0.1,soft_label_weight=0.5``, and the name that its files have."""

    name: str
    fields: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Setting:
        fields = dict(pair.split("=") for pair in text.split(","))
        values = {key: PARSED.get(key, float)(value) for key, value in fields.items()}
        return cls("_".join(f"{key}{value}" for key, value in fields.items()), values)


def main() -> None:
    """Tune every setting, or the one that a process of its own is given."""
    options = _options()
    if options.weights is not None:
        write_branch(options.clip, options.weights, options.out, options.start, options.share)
    elif options.only is not None:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        tune_one(options, Setting.parse(options.only))
    else:
        tune_all(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", required=True, help="folder of a CLIP in open_clip's format, or a source")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path, help="file of tools/pack_images.py")
    parser.add_argument("--weights", type=Path, help="write these weights to --out as a tuned folder, and end")
    parser.add_argument("--work", type=Path, help="folder of checkpoints; default: OUT/work")
    parser.add_argument("--minutes", type=float, default=4.0, help="of tuning; loading and measuring come on top")
    parser.add_argument("--steps", type=int, help="optimiser steps, instead of --minutes")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="fields of FARE: rho=0.1,temperature=0.1")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--attack-steps", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=4.0, help="of 255")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="on a GPU; no: TF32")
    parser.add_argument("--compile", choices=("no", "inductor", "cudagraphs"), default="no")
    parser.add_argument("--start", type=Path, help="go on from these weights of an earlier run")
    parser.add_argument("--share", type=float, default=1.0, help="of --weights in the average with --start")
    parser.add_argument("--mosaics", type=int, default=0, help="images of four small ones each, sharp at any side")
    parser.add_argument("--limit", type=int, help="use so many images only")
    parser.add_argument("--sequential", action="store_true", help="one setting after the other")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.weights is None and options.images is None:
        parser.error("--images: give the file of tools/pack_images.py")
    if options.weights is None and options.share != 1:
        parser.error("--share: give it with --weights; tuning from --start takes all of it")
    options.work = options.work or options.out / "work"
    return options


def tune_all(options: argparse.Namespace) -> None:
    """Run all settings, show how far they are, export previews, and write the report."""
    settings = [Setting.parse(text) for text in options.settings]
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    alone = options.sequential or not torch.cuda.is_available()
    groups = [[setting] for setting in settings] if alone else [settings]
    texts = dict(zip((setting.name for setting in settings), options.settings, strict=True))
    for group in groups:
        names = [setting.name for setting in group]
        running = {name: _start(options, texts[name], len(group)) for name in names}
        while any(process.poll() is None for process in running.values()):
            time.sleep(5)
            _show(options, names)
        for name, process in running.items():
            if process.returncode:
                print(f"{name}: failed with code {process.returncode}; see {options.work / name}.log", flush=True)
    found = {name: read_json(path) for name in texts if (path := options.work / f"{name}.json").exists()}
    report = {"chosen": choose(found), "settings": found, "arguments": sys.argv[1:]}
    write_json(options.out / "report.json", report)
    print(json.dumps(report, indent=1))


def choose(found: dict[str, Any]) -> str | None:
    """The setting that is most robust among those that lose little on clean images; else the one that loses least."""

    def loss(name: str) -> float:
        sets = found[name]["validation"]
        return max(sets[one]["original"] - sets[one]["clean"] for one in CLEAN_SETS if one in sets)

    def robust(name: str) -> float:
        sets = found[name]["validation"].values()
        return sum(one["universal"] + one["own"] for one in sets) / (2 * len(sets))

    allowed = [name for name in found if loss(name) <= LARGEST_LOSS]
    return max(allowed, key=robust) if allowed else min(found, key=loss, default=None)


def _start(options: argparse.Namespace, text: str, together: int) -> subprocess.Popen[bytes]:
    name = Setting.parse(text).name
    (options.work / f"{name}.ready").unlink(missing_ok=True)
    environment = {**os.environ, "TOGETHER": str(together)}
    with (options.work / f"{name}.log").open("wb") as log:
        arguments = [sys.executable, "-m", "tools.robust_branch", *sys.argv[1:], "--only", text]
        return subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _show(options: argparse.Namespace, names: list[str], shown: dict[str, Any] = {}) -> None:  # noqa: B006
    """Print the latest metrics of each run, and export its newest checkpoint."""
    for name in names:
        metrics, checkpoint = options.work / name / METRICS, options.work / name / CHECKPOINT
        if metrics.exists() and (lines := metrics.read_text().splitlines()) and lines[-1] != shown.get(name):
            shown[name], line = lines[-1], json.loads(lines[-1])
            keys = ("step", "loss", "distance_attacked", "relative_clean", "multiplier", "images_per_s")
            print(name, *(f"{key} {line[key]:.4g}" for key in keys if key in line), flush=True)
        weights = options.out / f"{name}.safetensors"
        done = weights.exists() and read_tensors(weights)[1]["state"] == "result"
        if checkpoint.exists() and not done:
            changed = checkpoint.stat().st_mtime
            if changed != shown.get(f"{name} exported"):
                shown[f"{name} exported"] = changed
                export(checkpoint, weights, {"state": "preview"})


def tune_one(options: argparse.Namespace, setting: Setting) -> None:
    """Tune one setting, measure it, write its weights."""
    accelerator = make_accelerator(mixed_precision=options.precision if torch.cuda.is_available() else "no")
    device, began = accelerator.device, time.perf_counter()
    source = options.clip if ":" in options.clip else f"open_clip:local-dir:{options.clip}"
    packed = unpack(options.images, "train", load_encoder(source).preprocess.image_size)
    train = _training_images(packed, options, device)
    defence = FARE(epsilon=options.epsilon / 255, attack_steps=options.attack_steps, scale_free=True, **setting.fields)
    settings = TrainSettings(
        steps=options.steps or 100_000, batch_size=options.batch_size, lr_encoder=options.lr, augment="photo",
        ema_decay=options.ema, selection="last", channels_last=True, compile=options.compile, samples=0,
        validation_every=10**9, log_every=20 if device.type == "cuda" else 1, checkpoint_every=10**9,
    )  # fmt: skip
    print(f"{len(train)} images loaded in {time.perf_counter() - began:.0f} s", flush=True)
    _wait_for_the_others(options.work, setting.name)
    if options.steps is None:
        step_s = seconds_per_step(source, train, defence, settings, accelerator)
        steps = max(100, round(60 * options.minutes / step_s))
        settings = _timed(settings, steps, max(20, round(EVERY / step_s)), warm=options.start is None)
        print(f"{step_s:.4f} s per step: {steps} steps", flush=True)
    student, folder = build_student(source, train), options.work / setting.name
    original = None if options.start is None else load_encoder(source)
    if options.start is not None:
        student.encoder.load_state_dict(read_weights(source, options.start).state_dict())
    late = threading.Timer(60 * LATE * options.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    late.daemon = True
    late.start()
    try:
        fit(student, train, None, defence, settings, out=folder, accelerator=accelerator, original=original)
    except Stopped as stopped:
        print(f"out of time: {stopped}", flush=True)
    finally:
        late.cancel()
    about = {"source": source, "defence": json.dumps({"name": "fare", **defence.to_dict()}),
             "train": json.dumps(settings.to_dict()), "state": "result"}  # fmt: skip
    weights = options.out / f"{setting.name}.safetensors"
    export(folder / CHECKPOINT, weights, about)
    tuned = read_weights(source, weights).to(device)
    seconds = time.perf_counter() - began
    torch.backends.cudnn.benchmark = False  # attacks leave out finished images: each new batch size would be tried out
    measured = measure(tuned, source, unpack(options.images, "validation", packed.pixels.shape[-1]), train, options)
    write_json(options.work / f"{setting.name}.json", {
        "fields": setting.fields, "settings": settings.to_dict(), "validation": measured, "seconds": round(seconds, 1),
        "last": json.loads((folder / METRICS).read_text().splitlines()[-1]),
    })  # fmt: skip


def _training_images(packed: Packed, options: argparse.Namespace, device: torch.device) -> LabelledImages:
    pixels, labels = packed.pixels[: options.limit], packed.labels[: options.limit]
    if options.mosaics:
        pixels = torch.cat([pixels, mosaics(packed, options.mosaics, seeded_generator(0))])
        labels = torch.cat([labels, labels.new_zeros(options.mosaics)])  # FARE without label_weight reads none
    return LabelledImages(_floats(pixels, device), labels, packed.class_names, "packed")


def _timed(settings: TrainSettings, steps: int, every: int, warm: bool) -> TrainSettings:
    values = settings.to_dict() | {
        "steps": steps, "checkpoint_every": max(1, every), "lr_warmup_steps": steps // 50,
        "epsilon_warmup_steps": steps // 10 if warm else 0,
    }  # fmt: skip
    return TrainSettings.from_dict(values)


def _wait_for_the_others(work: Path, name: str) -> None:
    """Until every run has its images, so that the speed of each is measured beside the others."""
    (work / f"{name}.ready").touch()
    deadline = time.monotonic() + 90
    while len(list(work.glob("*.ready"))) < int(os.environ.get("TOGETHER", "1")) and time.monotonic() < deadline:
        time.sleep(0.2)


def seconds_per_step(
    source: str, train: LabelledImages, defence: FARE, settings: TrainSettings, accelerator: Any
) -> float:
    """Of a student that is thrown away."""
    trainer = Trainer(build_student(source, train), train, defence, settings, out=Path(), accelerator=accelerator)
    warm, timed = PROBE
    began = 0.0
    for step, batch in trainer.batches(0, warm + timed):
        if step == warm:
            began = time.perf_counter()
        trainer.step(step, batch)  # waits for the device: its metrics are numbers
    return (time.perf_counter() - began) / timed


def export(checkpoint: Path, path: Path, about: dict[str, str]) -> None:
    """The encoder of a checkpoint, the average of its weights where there is one, in 16 bits."""
    tensors, _ = read_tensors(checkpoint)
    prefixes = ("model.encoder.", "average.encoder.")
    found = {name.removeprefix(prefix): part for prefix in prefixes for name, part in tensors.items()
             if name.startswith(prefix)}  # fmt: skip
    write_tensors(
        path, {name: part.half() if part.is_floating_point() else part for name, part in found.items()}, about
    )


def read_weights(source: str, path: Path) -> Encoder:
    """The encoder of a CLIP with the weights that :func:`export` wrote."""
    encoder, (tensors, _) = load_encoder(source), read_tensors(path)
    load_state_dict_strict(encoder.state_dict(), {name: part.float() if part.is_floating_point() else part
                           for name, part in tensors.items()}, str(path), f"it does not fit {source}")  # fmt: skip
    return encoder.eval()


def write_branch(clip: str, weights: Path, out: Path, start: Path | None = None, share: float = 1.0) -> None:
    """Write exported weights as a tuned folder, or their average with those of ``start``, where tuning began."""
    if not 0 < share <= 1 or (share < 1 and start is None):
        raise SystemExit(f"--share: expected a number in (0, 1], below 1 together with --start, got {share}")
    source = clip if ":" in clip else f"open_clip:local-dir:{clip}"
    about = read_tensors(weights)[1]
    parts: dict[str, Any] = {key: json.loads(about[key]) for key in ("defence", "train") if key in about}
    encoder = read_weights(source, weights)
    if start is not None and share < 1:
        earlier = read_weights(source, start).state_dict()
        for name, part in encoder.state_dict().items():
            if part.is_floating_point():
                part.copy_(earlier[name].lerp(part, share))
        parts["share"] = share
    write_tuned(out, encoder, {"role": "robust", "identity": {"source": source, **parts}})
    print(f"Written: {out}")


def measure(
    encoder: Encoder, source: str, packed: Packed, train: LabelledImages, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Accuracies on each source, in full precision.

    clean; original: of the public encoder; universal: under a universal perturbation of the public encoder at 10/255;
    transfer: under PGD-10 on the features of the public encoder; own: under PGD-10 on the branch itself.
    """
    public, text = load_clip(source)
    device = next(encoder.parameters()).device
    public = public.to(device)
    side, epsilon = packed.pixels.shape[-1], options.epsilon / 255
    steps = 2 if options.limit else 300
    uap = FeatureUAP(epsilon=10 / 255, image_size=side, steps=steps).fit(public, train.images[:2048])
    found = {}
    for name in packed.sources:
        few = packed.of(name)
        rows = torch.randperm(len(few.labels), generator=seeded_generator(0))[
            : min(MEASURED, options.limit or MEASURED)
        ]
        images, labels = _floats(few.pixels[rows], device), few.labels[rows].to(device)
        student = Student(encoder, zero_shot_head(text, few.class_names).to(device)).eval()
        untuned = Student(public, student.head).eval()
        transfer = PGD(epsilon=epsilon, loss="feature_l2", steps=10)(public, images, generator=seeded_generator(0))
        own = PGD(epsilon=epsilon, loss="ce", steps=10)(student.logits, images, labels, generator=seeded_generator(0))
        found[name] = {
            "original": _accuracy(untuned, images, labels),
            "original_universal": _accuracy(untuned, uap(images), labels),
            "clean": _accuracy(student, images, labels),
            "universal": _accuracy(student, uap(images), labels),
            "transfer": _accuracy(student, transfer, labels),
            "own": _accuracy(student, own, labels),
        }
        print(name, {key: round(100 * value, 1) for key, value in found[name].items()}, flush=True)
    return found


@torch.no_grad()
def _accuracy(student: Student, images: Tensor, labels: Tensor) -> float:
    return float((student.logits(images).argmax(-1) == labels).float().mean())


def _floats(pixels: Tensor, device: torch.device) -> Tensor:
    """(N, 3, S, S) uint8 in [0, 1] on the device."""
    floats = torch.empty(pixels.shape, device=device)
    for number, few in enumerate(pixels.split(4096)):
        floats[number * 4096 :][: len(few)] = few.to(device).float() / 255
    return floats


if __name__ == "__main__":
    main()
