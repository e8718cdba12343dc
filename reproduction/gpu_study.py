"""ZePAD around a ResNet-18 on one GPU: pre-training, five defences, universal and white-box attacks.

Three encoders are pre-trained on one data set: a public victim and a public auxiliary encoder, and a benign one on the
half of the images that only the defender has. They are tuned by the objectives of ``TUNINGS`` and combined to the
defences of ``DEFENCES``; heads are trained on clean images of each task. Every defence is evaluated with its branches
alone, under other fusion rules, and beside a victim tuned on clean images and an ensemble of untuned encoders.

Run first: ``pip install 'zepad-mm[ssl]'``.

    CPU, seconds  python -m reproduction.gpu_study --small
    1 GPU         python -m reproduction.gpu_study --data FOLDER --downstream "[FOLDER, FOLDER]"

The records in ``results/gpu`` were made by an earlier form of this program, by a clock instead of steps and epochs.
A killed run resumes. Writes ``RESULT.json`` and ``RESULT.md``, and under ``out`` the encoders and the evaluations.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from recipes import pretrain
from reproduction.ssl_study import (
    ROOT,
    Protocol,
    assemble,
    fit_branch,
    public_rows,
    study_tasks,
    task_data,
    whole,
    without_folders,
)
from zepad_mm.data import LabelledImages
from zepad_mm.encoders import Encoder, load_encoder
from zepad_mm.encoders.ssl_checkpoints import CIFAR
from zepad_mm.evaluation import EvalData, Report, Subject, evaluate, subject_of
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.pretraining import make_learner, probe
from zepad_mm.training import TuneSettings, make_accelerator, tune
from zepad_mm.utils.io import read_json, write_json, write_tensors, write_text

CONFIGS = ROOT / "reproduction" / "configs"
ATTACK_STEPS = 4  # of the attack that is tuned on
WEIGHTS = "encoder.safetensors"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One way to tune an encoder."""

    defence: str
    steps: int  # as many as the run of results/gpu made in about the same time for each
    options: dict[str, Any]
    head: str = "mlp"
    images: str = "public"  # "public", or "own": those that only the defender has
    train: dict[str, Any] | None = None  # what differs from the settings of all


TUNINGS = {
    "gen_af": Tuning(defence="gen_af", steps=155, options={"attack_steps": ATTACK_STEPS, "attack_step_size": None}),
    "released": Tuning(  # as the authors' code does: no augmentation, no clipping
        defence="gen_af_released",
        steps=154,
        options={"attack_steps": ATTACK_STEPS, "attack_step_size": 0.07 / ATTACK_STEPS},
        train={"optimizer": "adam", "weight_decay": 8e-4, "grad_clip": None, "augment": "none"},
    ),
    "fare": Tuning(defence="fare", steps=186, options={"epsilon": 0.03, "attack_steps": ATTACK_STEPS}),
    "fare_labels": Tuning(
        defence="fare",
        steps=171,
        options={"epsilon": 0.03, "attack_steps": ATTACK_STEPS, "label_weight": 30.0},
        head="probe",
    ),
    "clean": Tuning(defence="clean", steps=166, options={}),
    "clean_own": Tuning(defence="clean", steps=166, options={}, images="own"),
}
# name -> its branches, each an encoder or ENCODER+TUNING
DEFENCES = {
    "paper_corrected": ("victim+gen_af", "adv_au+gen_af", "bmp"),
    "paper_released": ("victim+released", "adv_au+released", "bmp"),
    "fare": ("victim+fare", "adv_au+fare", "bmp+clean_own"),
    "fare_labels": ("victim+fare_labels", "adv_au+fare_labels", "bmp+clean_own"),
    "corrected_own_benign": ("victim+gen_af", "adv_au+gen_af", "bmp+clean_own"),
}
CONTROLS = ("victim+clean", "adv_au", "bmp")


@dataclass(frozen=True, kw_only=True)
class GPUStudy(Protocol):
    """The study. ``victim``, ``adv_au`` and ``bmp`` are names of pre-training methods."""

    victim: str = "simclr"  # trained on all images but the validation images
    adv_au: str = "supcon"  # trained on the public half, with labels
    bmp: str = "simclr"  # trained on the defender's half
    layers: list[int]  # blocks of each stage; [2, 2, 2, 2] is a ResNet-18
    epochs: dict[str, int]  # of pre-training, by encoder
    defences: list[str]  # names of DEFENCES
    max_steps: int | None = None  # of each tuning; None: those of TUNINGS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.defences:
            if name not in DEFENCES:
                raise ValueError(f"defences: expected names of {', '.join(DEFENCES)}, got {name!r}")


def parse(arguments: Sequence[str] | None = None) -> GPUStudy:
    """The settings of a command line: those of ``gpu_study.yaml``, with ``--small`` of ``gpu_study_smoke.yaml``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    config = CONFIGS / ("gpu_study_smoke.yaml" if "--small" in words else "gpu_study.yaml")
    return GPUStudy.from_cli(["--config", str(config), *(word for word in words if word != "--small")])


def network(layers: Sequence[int]) -> nn.Module:
    """A new ResNet for small images: a 3x3 stem of stride 1 and padding 1, no pooling behind it."""
    backbone = ResNet(BasicBlock, list(layers))
    backbone.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool, backbone.fc = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    backbone.pretrained_cfg = {"mean": CIFAR[0], "std": CIFAR[1]}  # type: ignore[assignment]
    backbone.num_features = 512  # type: ignore[assignment]
    return backbone


def peak_mb(device: torch.device) -> int | None:
    """Largest memory of the GPU since the last call; None on a CPU."""
    if device.type != "cuda":
        return None
    largest = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return round(largest / 1e6)


class Study:
    """The encoders, made on first use, and the defences of each task."""

    def __init__(self, config: GPUStudy) -> None:
        self.config, self.out = config, Path(config.out)
        self.accelerator = make_accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
        self.device = self.accelerator.device
        self.task_sources = {Path(source).name: source for source in config.downstream}
        self.pretraining: dict[str, dict[str, Any]] = {}
        self.tuning: dict[str, dict[str, Any]] = {}
        self.encoder = functools.cache(self._encoder)
        self.branch = functools.cache(self._branch)

    # ---- encoders ----------------------------------------------------------------------------------------------

    def images(self, part: str) -> LabelledImages:
        """Training images: "public", "own" (the defender's half), "all" (both), or "validation"."""
        data = whole(self.config.data, "train", self.config.image_size)
        public, validation = public_rows(self.config)
        own = torch.arange(int(validation[-1]) + 1, len(data))
        parts = {"public": public, "own": own, "all": torch.cat([public, own]), "validation": validation}
        return data.subset(parts[part])

    def source(self, name: str) -> str:
        """The source string of a pre-trained encoder, which is trained first where it is not there."""
        path = self.out / name / WEIGHTS
        record = path.with_name("pretrain.json")
        if not record.is_file():
            write_json(record, self._pretrain(name, path))
        self.pretraining[name] = read_json(record)
        return f"ssl:{path}?stem=3x3p1&image_size={self.config.image_size}"

    def _pretrain(self, name: str, path: Path) -> dict[str, Any]:
        config, number = self.config, ("victim", "adv_au", "bmp").index(name)
        words = ["--config", str(CONFIGS / "gpu_study_pretrain.yaml"), "--data", config.data, "--out", str(path.parent)]
        words += ["--method", getattr(config, name), "--epochs", str(config.epochs[name])]
        words += ["--seed", str(config.seed + number), *config.pretrain_args]
        settings = pretrain.Settings.from_cli(words)
        train = self.images(("all", "public", "own")[number]).sample(settings.n, config.seed)
        torch.manual_seed(settings.seed)
        learner = make_learner(settings.method, network(config.layers).to(memory_format=torch.channels_last), settings)
        trained = [parameter for parameter in learner.to(self.device).train().parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
        wrapped, optimizer = self.accelerator.prepare(learner, optimizer)
        peak_mb(self.device)
        started = time.perf_counter()
        for epoch in range(settings.epochs):
            pretrain.train_epoch(settings, epoch, train, wrapped, optimizer, self.accelerator)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        write_tensors(path, learner.encoder.state_dict())
        return {
            "config": without_folders(asdict(settings)),
            "n_train": len(train),
            "seconds": round(seconds, 1),
            "images_per_s": round(settings.epochs * len(train) / seconds),
            "peak_mb": peak_mb(self.device),
            **probe(learner, train, self.images("validation").sample(config.n_validation, config.seed), self.device),
        }

    def _encoder(self, name: str) -> Encoder:
        """A frozen encoder by name: pre-trained, or tuned by one of ``TUNINGS``."""
        base, _, tuning = name.partition("+")
        source = self.source(base)
        encoder = self._tune(name, source, TUNINGS[tuning]) if tuning else load_encoder(source)
        return encoder.to(self.device).eval().requires_grad_(False)

    def _tune(self, name: str, source: str, tuning: Tuning) -> Encoder:
        config, steps = self.config, min(tuning.steps, self.config.max_steps or tuning.steps)
        settings = TuneSettings(
            source=source,
            head=tuning.head,
            defence=tuning.defence,
            defence_options=tuning.options,
            settings=replace(config.train, steps=steps, **(tuning.train or {})),
        )
        train = self.images(tuning.images).sample(config.n_tune, config.seed)
        validation = self.images("validation").sample(config.n_validation, config.seed)
        peak_mb(self.device)
        tuned = tune(settings, train, validation, out=self.out / name, accelerator=self.accelerator)
        self.tuning[name] = {**tuned.record, "peak_mb": peak_mb(self.device)}
        return tuned.encoder

    # ---- defences ----------------------------------------------------------------------------------------------

    def _branch(self, name: str, task: str) -> Branch:
        """An encoder with a head for a task."""
        base, _, tuning = name.partition("+")
        train = task_data(self.config, self.task_sources[task])[0]
        about = BranchConfig(
            name=name,
            role="robust" if tuning and TUNINGS[tuning].defence != "clean" else "benign",
            source=self.source(base),
            adaptation="full" if tuning else "none",
            head="mlp",
            objective=TUNINGS[tuning].defence if tuning else "",
        )
        return fit_branch(self.config, about, self.encoder(name), train, self.accelerator)

    def model(self, defence: str) -> Callable[[str, EvalData], Subject]:
        """What builds a defence with its controls for a task."""

        def build(task: str, data: EvalData) -> Subject:
            branches = [self.branch(name, task) for name in DEFENCES[defence]]
            zepad = assemble(self.config, branches, self.branch("victim", task), data.test.class_names)
            controls = {name: self.branch(name, task) for name in CONTROLS}
            subject = subject_of(zepad, rules=("rfdm", "capped_rfdm", "equal"), baselines=controls)
            untuned = ["undefended", "baseline:adv_au", "baseline:bmp"]
            return subject.with_fused_row("untuned_ensemble", untuned, "equal")

        return build


def main(config: GPUStudy) -> Report:
    """Run the study and write both files; returns the report."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    started, study = time.perf_counter(), Study(config)
    report = evaluate(
        models={name: study.model(name) for name in config.defences},
        tasks=study_tasks(config, study.task_sources),
        settings=config.evaluation,
        out=study.out / "evaluation",
        resume=True,
        accelerator=study.accelerator,
    )
    about = {"config": config.to_dict(), "pretraining": study.pretraining, "tuning": study.tuning}
    meta = without_folders({**report.meta, **about, "study_s": round(time.perf_counter() - started, 1)})
    report = Report(meta, report.rows, report.detection)
    write_json(f"{config.result}.json", report.to_dict())
    write_text(f"{config.result}.md", report.markdown())
    return report


if __name__ == "__main__":
    print(main(parse()).markdown())
