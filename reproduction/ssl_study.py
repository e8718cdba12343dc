"""ZePAD on SSL encoders: pre-train, tune once, train heads per task, evaluate.

Three SSL encoders: a public victim, a public auxiliary one, and a benign one that no attacker has. The first two are
tuned adversarially, once, on a labelled part of ``data``; for every data set of ``downstream`` only heads are trained,
on clean images. Checkpoints and thresholds are selected on validation images alone.

Run first: ``pip install 'zepad-mm[ssl]'``. ``victim``, ``adv_au`` and ``bmp`` are encoder sources as for
``load_encoder``, or configurations of ``recipes/pretrain.py``, which run where needed.

    CPU, 1 GPU  python -m reproduction.ssl_study --config reproduction/configs/ssl_study.yaml
    8 GPUs      accelerate launch --multi_gpu --num_processes 8 reproduction/ssl_study.py --config ...
    2 nodes     torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
                    reproduction/ssl_study.py --config ...

All processes share pre-training, tuning, encoding and attacks. A killed run resumes. Writes ``RESULT.json`` and
``RESULT.md``, and under ``out`` the encoders, the evaluations, and one ``ZePAD`` model per task.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from recipes import pretrain
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders import Encoder, load_encoder
from zepad_mm.evaluation import EvalData, EvalSettings, Report, Subject, evaluate, subject_of
from zepad_mm.models.branch import Branch, BranchConfig, Role
from zepad_mm.models.config import GATED_RULE, DetectorConfig
from zepad_mm.models.detection import GATE_SCORE
from zepad_mm.models.gate import FeatureGate
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.training import (
    GateSettings,
    HeadSettings,
    TrainSettings,
    TuneSettings,
    encode_images,
    fresh_head,
    load_gate,
    make_accelerator,
    train_head_on_features,
    tune,
    write_gate,
)
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.provenance import check_identity

ROOT = Path(__file__).parents[1]
TUNINGS = {"victim_tuned": "victim", "adv_au_tuned": "adv_au", "victim_clean": "victim"}  # tuned encoder -> its base


@dataclass(frozen=True, kw_only=True)
class Protocol(Config):
    """Data, encoders and training of a study. The defaults are those of shipped configurations, not of the paper."""

    data: str  # tuned on once; its first half is public (tuning, attackers), its second half the defender's
    downstream: list[str]  # tasks, each a data set with the splits train and test
    out: str  # folder of everything but the table
    result: str  # where the table goes
    bmp: str = "recipes/configs/ssl_resnet/pretrain_benign.yaml"  # encoder source, or a configuration that makes it
    pretrain_args: list[str] = field(default_factory=list)  # further arguments for those configurations
    image_size: int = 32  # side that all images are resized to, and attacked at
    one_split: dict[str, str] = field(default_factory=dict)  # task -> its only split; a quarter of it is the test set
    n_tune: int | None = None  # tuning images, of the public half less its last tenth, which is validation
    n_validation: int = 1000  # at most
    n_head: int | None = None  # images that heads are trained on
    train: TrainSettings = field(default_factory=TrainSettings)  # of all tunings
    head: HeadSettings = field(default_factory=HeadSettings)
    rule: str = "bounded_benign"  # fusion of the row "zepad"
    rule_options: dict[str, Any] = field(default_factory=dict)
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    seed: int = 0
    threads: int | None = None  # torch threads on the CPU; None leaves the default


@dataclass(frozen=True, kw_only=True)
class StudySettings(Protocol):
    """The study of one victim."""

    victim: str = "recipes/configs/ssl_resnet/pretrain_victim.yaml"
    adv_au: str = "recipes/configs/ssl_resnet/pretrain_auxiliary.yaml"
    defence: str = "gen_af"  # ZePAD's objective; gen_af_released for the authors' code as it is, or any other
    defence_options: dict[str, Any] = field(default_factory=dict)


@functools.cache
def whole(source: str, split: str, image_size: int) -> LabelledImages:
    return load_data(source, split, image_size)


def public_rows(config: Protocol) -> tuple[Tensor, Tensor]:
    """(tuning, validation) rows of ``data``: the first half, whose last tenth no encoder ever trained on."""
    half = len(whole(config.data, "train", config.image_size)) // 2
    border = half - max(1, half // 10)
    return torch.arange(border), torch.arange(border, half)


def task_data(config: Protocol, source: str) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
    """(train, validation, test) of a task; its validation images trained neither head nor encoder."""
    pool = _pool_and_test(config, source)[0]
    if source == config.data:
        held_out = public_rows(config)[1]
    else:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(config.seed))
        held_out = order[: max(1, len(pool) // 10)]
    rest = torch.ones(len(pool), dtype=torch.bool)
    rest[held_out] = False
    test = test_images(config, source, config.evaluation.n)
    validation = pool.subset(held_out).sample(config.n_validation, config.seed)
    return pool.subset(rest.nonzero()[:, 0]).sample(config.n_head, config.seed), validation, test


def test_images(config: Protocol, source: str, n: int | None) -> LabelledImages:
    """At most ``n`` test images of a task, drawn by the seed; None: all."""
    return _pool_and_test(config, source)[1].sample(n, config.seed)


def _pool_and_test(config: Protocol, source: str) -> tuple[LabelledImages, LabelledImages]:
    """The training and the test split of a task, or three quarters and a quarter of its only one."""
    split = config.one_split.get(Path(source).name)
    if split is None:
        return whole(source, "train", config.image_size), whole(source, "test", config.image_size)
    images = whole(source, split, config.image_size)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    return images.subset(order[len(images) // 4 :]), images.subset(order[: len(images) // 4])


def surrogate_images(config: Protocol) -> LabelledImages:
    """The attacker's images, from the public half; their labels are not used."""
    images = whole(config.data, "train", config.image_size).subset(public_rows(config)[0])
    return images.sample(config.evaluation.n_surrogate, config.seed + 1)


def study_tasks(config: Protocol, sources: dict[str, str]) -> dict[str, EvalData]:
    """Short name of each task -> its images; the surrogate images are the same for all."""
    surrogate, tasks = surrogate_images(config), {}
    for task, source in sources.items():
        _, validation, test = task_data(config, source)
        tasks[task] = EvalData(test, validation, surrogate)
    return tasks


def pretrained_source(config: Protocol, name: str, given: str, accelerator: Accelerator) -> str:
    """The source string of an encoder, pre-trained first where it is given as a configuration."""
    if not given.endswith(".yaml"):
        return given
    folder = Path(config.out) / name
    if not (folder / "pretrain.json").is_file():
        path = Path(given) if Path(given).is_file() else ROOT / given
        threads = ["--threads", str(config.threads)] if config.threads else []
        options = ["--data", config.data, "--out", str(folder), "--image_size", str(config.image_size)]
        pretrain.main(["--config", str(path), *options, *threads, *config.pretrain_args])
    accelerator.wait_for_everyone()
    return f"timm:local-dir:{folder / 'encoder'}"


def fit_branch(
    config: Protocol, about: BranchConfig, encoder: Encoder, train: LabelledImages, accelerator: Accelerator
) -> Branch:
    """An encoder with a clean MLP head for one task, frozen."""
    features = encode_images(encoder, train.images, 500, accelerator)
    head = fresh_head("mlp", encoder.feature_dim, len(train.class_names), config.head.seed)
    train_head_on_features(head, features, train.labels, config.head)
    return Branch(about, encoder, head).to(accelerator.device).eval().requires_grad_(False)


def kept_gate(
    folder: Path, settings: GateSettings, train: Callable[[Path], tuple[FeatureGate, dict[str, Any]]]
) -> tuple[FeatureGate, dict[str, Any]]:
    """A gate and its record, kept in ``folder``; where missing, ``train`` makes them, given a folder for its cache.

    Raises ValueError where the kept one has other settings.
    """
    file, record = folder / "gate.safetensors", folder / "gate.json"
    if not (file.is_file() and record.is_file()):
        gate, found = train(folder / "cache")
        write_gate(file, gate)
        write_json(record, found)
    found = read_json(record)
    remedy = "its gate was trained with other settings; give another output folder, or delete it"
    check_identity(found["settings"], settings.to_dict(), folder, ignore=("encode_batch_size",), remedy=remedy)
    return load_gate(file), found


def assemble(
    config: Protocol,
    branches: list[Branch],
    undefended: Branch,
    class_names: tuple[str, ...],
    gate: FeatureGate | None = None,
    policy_caps: dict[str, float] | None = None,
) -> ZePAD:
    """The defence of one task, next to the undefended victim; with a gate its rule is "gated", with these caps."""
    gated = gate is not None
    about = ZePADConfig(
        public_source=undefended.config.source,
        branches=tuple(branch.config for branch in branches),
        class_names=class_names,
        fusion=GATED_RULE if gated else config.rule,
        fusion_params={} if gated else config.rule_options,
        detector=DetectorConfig(score=GATE_SCORE) if gated else DetectorConfig(),
        gate=gate.config if gate is not None else None,
        policy_caps=policy_caps or {},
    )
    model = ZePAD(about, branches, gate).set_undefended(undefended)
    return model.set_policy("zero_sacrifice") if policy_caps else model


class Study:
    """The encoders, tuned once, and the model of each task."""

    def __init__(self, config: StudySettings) -> None:
        self.config, self.accelerator = config, make_accelerator()
        self.task_sources = {Path(source).name: source for source in config.downstream}
        given = {"victim": config.victim, "adv_au": config.adv_au, "bmp": config.bmp}
        self.sources = {
            name: pretrained_source(config, name, source, self.accelerator) for name, source in given.items()
        }
        self.encoders = {name: load_encoder(source) for name, source in self.sources.items()}
        self.tunings: dict[str, dict[str, Any]] = {}
        for name in TUNINGS:
            self._tune(name)
        for encoder in self.encoders.values():
            encoder.to(self.accelerator.device).eval().requires_grad_(False)

    def _tune(self, name: str) -> None:
        config, clean = self.config, name.endswith("clean")
        images = whole(config.data, "train", config.image_size)
        train_rows, validation_rows = public_rows(config)
        tuning = TuneSettings(
            source=self.sources[TUNINGS[name]],
            head="mlp",
            defence="clean" if clean else config.defence,
            defence_options={} if clean else config.defence_options,
            settings=config.train,
        )
        train = images.subset(train_rows).sample(config.n_tune, config.seed)
        validation = images.subset(validation_rows).sample(config.n_validation, config.seed)
        tuned = tune(tuning, train, validation, out=Path(config.out) / name, accelerator=self.accelerator)
        self.encoders[name], self.tunings[name] = tuned.encoder, tuned.record

    def branch(self, name: str, train: LabelledImages, role: Role = "benign") -> Branch:
        """An encoder of the study with a head for a task."""
        about = BranchConfig(
            name=name,
            role=role,
            source=self.sources[TUNINGS.get(name, name)],
            adaptation="full" if name in TUNINGS else "none",
            head="mlp",
            objective=self.tunings[name]["identity"]["defence"]["name"] if name in TUNINGS else "",
        )
        return fit_branch(self.config, about, self.encoders[name], train, self.accelerator)

    def model(self, task: str, data: EvalData) -> Subject:
        """The defence of a task with its controls; the defence is also saved."""
        train = task_data(self.config, self.task_sources[task])[0]
        branches = [self.branch(name, train, "robust") for name in ("victim_tuned", "adv_au_tuned")]
        zepad = assemble(
            self.config, [*branches, self.branch("bmp", train)], self.branch("victim", train), train.class_names
        )
        if self.accelerator.is_main_process:
            zepad.save_pretrained(Path(self.config.out) / f"zepad-{task}")
        controls = {"clean_finetuned": self.branch("victim_clean", train), "adv_au": self.branch("adv_au", train)}
        subject = subject_of(zepad, rules=("equal", "rfdm"), baselines=controls)
        subject = subject.with_fused_row("mpae", ["branch:victim_tuned", "branch:adv_au_tuned"], "bounded_benign")
        untuned = ["undefended", "baseline:adv_au", "branch:bmp"]
        return subject.with_fused_row("untuned_ensemble", untuned, "equal")


def main(config: StudySettings) -> Report:
    """Run the study and write both files; returns the report."""
    if config.threads:
        torch.set_num_threads(config.threads)
    study = Study(config)
    report = evaluate(
        models={"ssl": study.model},
        tasks=study_tasks(config, study.task_sources),
        settings=config.evaluation,
        out=Path(config.out) / "evaluation",
        resume=True,
        accelerator=study.accelerator,
    )
    meta = without_folders({**report.meta, "config": config.to_dict(), "tuning": study.tunings})
    report = Report(meta, report.rows, report.detection)
    if study.accelerator.is_main_process:
        write_json(f"{config.result}.json", report.to_dict())
        write_text(f"{config.result}.md", report.markdown())
    return report


def without_folders(value: Any) -> Any:
    """The same with absolute paths cut to their last part: a record names no machine's folders."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return re.sub(r"(?<![\w.-])/\S*/", "", value) if isinstance(value, str) else value


if __name__ == "__main__":
    print(main(StudySettings.from_cli()).markdown())
