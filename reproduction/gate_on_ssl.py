"""The feature gate on SSL victims: a robust branch by FARE, the gate, clean heads for each task, and the evaluation.

    python -m reproduction.gate_on_ssl --config reproduction/configs/gate_on_ssl.yaml --data_root DIR

``victims`` are folders of recipes/pretrain.py. Each victim is tuned once, without labels, on the sets of ``tuned_on``;
its gate is trained on the same images. For each task linear heads are trained on clean images, for the victim and its
robust branch. Thresholds of the gate and the cap of the benign weight are set on clean validation images of all tasks,
from the training splits; neither tuning, the fit of the gate nor heads saw them. Attackers make universal perturbations
(T1) on the victim from images of ``surrogate``, which nothing else uses; some kinds are unknown to the gate.

DIR holds the parquet folders of the sets. A killed run resumes. Writes ``RESULT.json`` and ``RESULT.md``, in which
victims of earlier runs stay, and under ``out`` the tuned encoders, the gates and the evaluations.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from reproduction.gate_on_ssl_page import page
from reproduction.ssl_study import kept_gate, without_folders
from zepad_mm.data import LabelledImages, joined, load_data
from zepad_mm.encoders import Encoder, load_encoder
from zepad_mm.evaluation import EvalData, EvalSettings, Report, evaluate
from zepad_mm.evaluation.metrics import share
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.fusion import GATED_RULE
from zepad_mm.models.gate import FeatureGate
from zepad_mm.models.zepad import DetectorConfig, ZePAD, ZePADConfig
from zepad_mm.selection import accuracy_lost, harmless_cap
from zepad_mm.training import (
    GateSettings,
    HeadSettings,
    TrainSettings,
    TuneSettings,
    encode_images,
    fresh_head,
    train_gate,
    train_head_on_features,
    tune,
)
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.provenance import provenance
from zepad_mm.utils.stopping import run_program

log = logging.getLogger(__name__)
SCORE = "feature_gate"
SCORES = (SCORE, "confidence_gap", "jensen_shannon")  # ours, the paper's, and another without a gate
PRETRAINING = (
    "method", "data", "more_data", "initial", "arch", "image_size", "n", "epochs", "batch_size", "lr", "bn_mode",
)  # fmt: skip  # what the record keeps of its configuration


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """Settings of the study."""

    victims: dict[str, str]  # name -> folder of recipes/pretrain.py
    data_root: str  # folder of the sets; "embedded" needs none
    out: str = "outputs/gate_on_ssl"
    result: str = "results/gate_ssl"  # without suffix
    tuned_on: tuple[str, ...] = ("tinyimagenet80", "cifar10")  # without labels: robust branch and gate
    tasks: tuple[str, ...] = ("cifar10", "gtsrb", "imagenet20", "tinyimagenet80", "clothing144")
    surrogate: str = "caltech69"  # its training split is the attacker's
    image_size: int = 64
    n_tune: int = 6000  # images of each set
    n_head: int = 4000  # images of each task, of those that neither thresholds nor caps are set on
    n_validation: int = 400  # images of each task
    defence_options: dict[str, Any] = field(default_factory=dict)  # of FARE
    own_options: dict[str, dict[str, Any]] = field(default_factory=dict)  # victim -> those in which it differs
    train: TrainSettings = field(default_factory=TrainSettings)  # of FARE
    gate: GateSettings = field(default_factory=GateSettings)
    head: HeadSettings = field(default_factory=HeadSettings)
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    seed: int = 0
    threads: int | None = None  # torch threads on the CPU; None leaves the default


@dataclass(frozen=True)
class Task:
    """One set by purpose: ``train`` for tuning, gate and heads; ``validation`` of the same split; ``test``."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages


class Images:
    """The sets of a study, loaded once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tasks = {name: self._task(name) for name in dict.fromkeys((*settings.tasks, *settings.tuned_on))}

    def load(self, name: str, split: str, n: int | None) -> LabelledImages:
        """``n`` images of a split, drawn by the seed."""
        source = name if name == "embedded" else str(Path(self.settings.data_root) / name)
        return load_data(source, split, self.settings.image_size, n, self.settings.seed)

    @cached_property
    def surrogate(self) -> LabelledImages:
        return self.load(self.settings.surrogate, "train", self.settings.evaluation.n_surrogate)

    @cached_property
    def tuning(self) -> dict[str, LabelledImages]:
        """Images of each set that the robust branch and the gate are made of."""
        return {name: self.tasks[name].train.sample(self.settings.n_tune, 1) for name in self.settings.tuned_on}

    def _task(self, name: str) -> Task:
        settings = self.settings
        drawn = self.load(name, "train", max(settings.n_head, settings.n_tune) + settings.n_validation)
        held = min(settings.n_validation, len(drawn) // 4)
        order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(settings.seed))
        test = self.load(name, "test", settings.evaluation.n)
        return Task(drawn.subset(order[held:]), drawn.subset(order[:held]), test)


class Victim:
    """A victim, its robust branch and its gate, and the model of each task.

    Args:
        name: of the victim. folder: of recipes/pretrain.py. images: of the study.
    """

    def __init__(self, name: str, folder: str, images: Images) -> None:
        self.name, self.images, self.settings = name, images, images.settings
        self.pretraining = read_json(Path(folder) / "pretrain.json")
        self.source = f"timm:local-dir:{Path(folder) / 'encoder'}"
        self.out = Path(self.settings.out) / name
        self.public = load_encoder(self.source).eval().requires_grad_(False)
        self.robust, self.tuning = self._tune()
        self.gate, self.gate_record = self._gate()
        self.cap = 1.0
        self._models: dict[str, ZePAD] = {}

    def _tune(self) -> tuple[Encoder, dict[str, Any]]:
        settings = self.settings
        tuning = TuneSettings(
            source=self.source,
            head="probe",  # for validation alone; FARE reads no label
            defence="fare",
            defence_options=settings.defence_options | settings.own_options.get(self.name, {}),
            settings=settings.train,
        )
        validation = joined([self.images.tasks[name].validation for name in settings.tuned_on])
        tuned = tune(tuning, joined(list(self.images.tuning.values())), validation, out=self.out / "robust")
        return tuned.encoder.eval().requires_grad_(False), tuned.record

    def _gate(self) -> tuple[FeatureGate, dict[str, Any]]:
        def train(cache: Path) -> tuple[FeatureGate, dict[str, Any]]:
            return train_gate(
                self.public,
                [self.robust],
                joined(list(self.images.tuning.values())),  # as one: two sets say little of one left out
                self.settings.gate,
                calibration={task: self.images.tasks[task].validation for task in self.settings.tasks},
                out=cache,
            )

        return kept_gate(self.out / "gate", self.settings.gate, train)

    def select_cap(self) -> None:
        """Set the cap of all models: the lowest one that costs nothing on the validation images of all tasks."""
        sets = {task: self.images.tasks[task].validation for task in self.settings.tasks}
        self.cap = harmless_cap([accuracy_lost(self.model(task), data) for task, data in sets.items()])
        log.info("%s: cap %.2f of the benign weight", self.name, self.cap)
        for model in self._models.values():
            model.config = replace(model.config, policy_caps={"zero_sacrifice": self.cap})
            model.set_policy("zero_sacrifice")

    def model(self, task: str, data: EvalData | None = None) -> ZePAD:
        """The defended model of a task, with linear heads on clean images."""
        if task not in self._models:
            train = self.images.tasks[task].train.sample(self.settings.n_head, self.settings.seed)
            robust = self._branch("robust", self.robust, train)
            public = self._branch("public", self.public, train)
            detector = DetectorConfig(score=SCORE, threshold=self.gate_record["thresholds"]["detection"])
            config = ZePADConfig(
                public_source=self.source,
                branches=(robust.config, public.config),
                class_names=train.class_names,
                fusion=GATED_RULE,
                detector=detector,
                gate=self.gate.config,
                policy_caps={"zero_sacrifice": self.cap},
            )
            self._models[task] = ZePAD(config, [robust, public], self.gate).set_undefended(public)
        return self._models[task]

    def _branch(self, name: str, encoder: Encoder, train: LabelledImages) -> Branch:
        robust = name == "robust"
        about = BranchConfig(
            name=name,
            role="robust" if robust else "benign",
            source=self.source,
            adaptation="full" if robust else "none",
            head="linear",
            objective="fare" if robust else "",
        )
        features = encode_images(encoder, train.images)
        head = fresh_head("linear", encoder.feature_dim, len(train.class_names), self.settings.head.seed)
        train_head_on_features(head, features, train.labels, self.settings.head)
        return Branch(about, encoder, head).eval().requires_grad_(False)

    def record(self, report: Report) -> dict[str, Any]:
        """What the committed record keeps."""
        config = self.pretraining["config"]
        probes = {key: self.pretraining[key] for key in ("knn_accuracy", "linear_accuracy")}
        return {
            "pretraining": {
                "config": {key: config[key] for key in PRETRAINING if key in config},
                "commit": self.pretraining["commit"],
                "before": self.pretraining.get("before"),
                "after": probes,
                **{key: self.pretraining[key] for key in ("n_train", "n_held_out", "parameters", "wall_s")},
            },
            "tuning": {
                "defence": self.tuning["identity"]["defence"],
                **{key: self.tuning[key] for key in ("steps", "best_step", "validation", "seconds")},
            },
            "gate": {key: value for key, value in self.gate_record.items() if key != "settings"},
            "cap": self.cap,
            "sets": {task: self._set(task, report) for task in self.settings.tasks},
        }

    def _set(self, task: str, report: Report) -> dict[str, Any]:
        names = {"": "gated", "/undefended": "undefended", "/branch:robust": "robust"}
        names = {self.name + row: model for row, model in names.items()}
        kept = ("threat", "attack", "algorithm", "n", "accuracy", "ci_low", "ci_high")
        rows = [
            {"model": names[row["model"]], **{key: row[key] for key in kept if key in row}}
            for row in report.rows
            if row["dataset"] == task and row["model"] in names
        ]
        scored = ("score", "attack", "auroc", "tpr_at_fpr5", "fpr_at_fpr5", "n")
        detection = [
            {key: row[key] for key in scored}
            for row in report.detection
            if row["dataset"] == task and row["model"] == self.name and row["score"] in SCORES
        ]
        test, model = self.images.tasks[task].test, self.model(task)
        flagged = torch.cat([model.is_adversarial(model.decide(few)) for few, _ in test.batches(100)])
        alarms = share(flagged)
        return {
            "n": len(test),
            "classes": len(test.class_names),
            "rows": rows,
            "detection": detection,
            "false_alarms": {"share": alarms.value, "ci": list(alarms.interval)},
        }


def main(settings: Settings) -> dict[str, Any]:
    """Run the study of each victim and write both files; returns the record."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    started, images = time.perf_counter(), Images(settings)
    file, record = Path(f"{settings.result}.json"), dict[str, Any]()
    found = read_json(file)["victims"] if file.is_file() else {}
    for name, folder in settings.victims.items():
        victim = Victim(name, folder, images)
        victim.select_cap()
        report = evaluate(
            models={name: victim.model},
            tasks={task: eval_data(images, task) for task in settings.tasks},
            settings=settings.evaluation,
            out=victim.out / "evaluation",
            resume=True,
        )
        found[name] = victim.record(report)
        log.info("%s finished after %.0f s", name, time.perf_counter() - started)
        meta = provenance(seed=settings.seed, config=settings.to_dict())
        record = without_folders({"meta": meta, "victims": found})
        write_json(file, record)
        write_text(f"{settings.result}.md", page(record))
    return record


def eval_data(images: Images, task: str) -> EvalData:
    """The images of a task as the evaluation reads them; surrogate images are the same for all."""
    own = images.tasks[task]
    return EvalData(own.test, own.validation, images.surrogate)


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(Settings.from_cli())))
