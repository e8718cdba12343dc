"""A zoo of encoders under the paper's protocol: tunings, heads, models for ``evaluate``; each made once, kept on disk.

Encoders have names, and a table is a set of lines, each an encoder or a fusion of encoders
(``reproduction/paper/lines.py``), evaluated for every victim on every task.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reproduction import ssl_study
from reproduction.paper.lines import Line, adversarial, fused, parts, with_seed
from zepad_mm.attacks import PGD, Perturbation
from zepad_mm.data import LabelledImages, joined
from zepad_mm.defences import Student, robustness_contributions, unfreeze_redundant
from zepad_mm.encoders import Encoder, load_encoder, optimize_for_inference
from zepad_mm.evaluation import EvalData, EvalSettings, Report, Row, RowKind, Subject, evaluate
from zepad_mm.evaluation.subjects import UNDEFENDED, FusedAnswer, first_logits
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.config import GATED_RULE, DetectorConfig
from zepad_mm.models.detection import GATE_SCORE
from zepad_mm.models.gate import FeatureGate
from zepad_mm.models.zepad import ZePAD
from zepad_mm.selection import accuracy_lost, harmless_cap
from zepad_mm.training import (
    GateSettings,
    TuneSettings,
    encode_images,
    load_head,
    make_accelerator,
    train_gate,
    tune,
    write_head,
)
from zepad_mm.training.artifacts import TUNED_RECORD
from zepad_mm.training.heads import fresh_head, train_head_on_features
from zepad_mm.utils.io import read_json


@dataclass(frozen=True, kw_only=True)
class Settings(ssl_study.Protocol):
    """The study of a zoo. ``downstream`` are the tasks, ``data`` is tuned on."""

    zoo: str = "outputs/ssl_zoo"  # folder of reproduction/build_ssl_zoo.py
    victims: list[str] = field(default_factory=lambda: ["w_mse", "byol", "simclr", "dino"])  # names in the zoo
    adv_au: str = "byol"  # the auxiliary encoder, a name in the zoo
    adv_au_for_itself: str = "nnclr"  # where the victim is the auxiliary encoder
    more_adv_au: list[str] = field(default_factory=list)  # further ones, for the table of their number
    # name -> defence, options, head, train, half (public or own), more (whether more_data is tuned on too), after (a
    # tuning: this is Gen-AF's second stage of it)
    tunings: dict[str, dict[str, Any]] = field(default_factory=dict)
    more_data: list[str] = field(default_factory=list)  # further images without labels, for the gate and for "more"
    n_more: int | None = None  # at most as many of each
    surrogate_data: str | None = None  # the attacker's images for all tasks but ``data``; None: the public half of data
    gate: GateSettings | None = None  # of ours, between the tuned victim and the victim; None: ours fuses three by rule
    n_critical: int = 1000  # tuning images on which the second stage ranks layers
    tuning: str = "gen_af"  # the paper's
    our_tuning: str = "fare"  # ours
    other_tuning: str = "half_clean"  # without a gate: of the auxiliary encoder where the two differ
    labelled_tuning: str = "fare_labels"  # without a gate: a candidate for ours
    our_bmp: str = "bmp+clean_own"  # without a gate: the benign encoder of ours
    paper_victims: list[str] | None = None  # victims that the main table shows the paper's defence of; None: all
    threats: list[str] = field(default_factory=lambda: ["T1", "T1b"])  # of the main table
    studied: list[str] = field(default_factory=lambda: ["simclr"])  # victims of every table but main, clean and seeds
    repeated: list[str] = field(default_factory=list)  # victims of the table of seeds
    seeds: list[int] = field(default_factory=list)  # its seeds besides ``seed``
    n_clean: int = 2500  # test images per task in the table "clean", if there are as many
    n_selection: int = 200  # validation images for the selection of the fusion rule
    white_box: EvalSettings = field(default_factory=EvalSettings)  # of the white-box tables
    white_box_epsilons: list[float] = field(default_factory=list)  # its further budgets, for the first studied victim

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repeated and (not self.seeds or len({self.seed, *self.seeds}) <= len(self.seeds)):
            raise ValueError(
                f"seeds: expected at least one for {', '.join(self.repeated)}, all different and none the seed of the "
                f"study ({self.seed}), got {self.seeds}"
            )


class Study:
    """Encoders, heads and evaluations of a configuration."""

    def __init__(self, config: Settings) -> None:
        self.config, self.out = config, Path(config.out)
        self.accelerator = make_accelerator()
        self.device = self.accelerator.device
        self.tasks = {Path(source).name: source for source in config.downstream}

    # ---- encoders ------------------------------------------------------------------------------------------------

    def partner(self, victim: str) -> str:
        """The auxiliary encoder next to a victim."""
        itself = parts(victim).base == self.config.adv_au
        return self.config.adv_au_for_itself if itself else self.config.adv_au

    def defended(self, victim: str) -> tuple[str, str, str]:
        """The three encoders of the paper's defence of a victim."""
        return self._members(victim, self.config.tuning, "bmp")

    def has_papers(self, victim: str) -> bool:
        """Whether the main table shows the paper's defence of a victim."""
        return self.config.paper_victims is None or victim in self.config.paper_victims

    def ours(self, victim: str) -> tuple[str, str, str]:
        """The three encoders of ours: another tuning, and a benign encoder tuned with labels."""
        return self._members(victim, self.config.our_tuning, self.config.our_bmp)

    def our_line(self, victim: str) -> Line:
        """Ours: the tuned victim and the victim under a gate, or three encoders under the rule."""
        config = self.config
        if config.gate is None:
            return fused(config.rule, self.ours(victim), **config.rule_options)
        return fused(GATED_RULE, self.gated_members(victim), cap=self.cap(victim))

    def gated_members(self, victim: str) -> tuple[str, str]:
        """The two encoders of ours under a gate."""
        base, _, seed, _ = parts(victim)
        return with_seed(f"{base}+{self.config.our_tuning}", seed), victim

    def labelled(self, victim: str) -> tuple[str, str, str]:
        """Ours, tuned by FARE with labels in addition to the distance."""
        return self._members(victim, self.config.labelled_tuning, self.config.our_bmp)

    def mixed(self, victim: str) -> tuple[str, str, str]:
        """Ours, with the auxiliary encoder tuned by another objective."""
        return (self.ours(victim)[0], f"{self.partner(victim)}+{self.config.other_tuning}", self.config.our_bmp)

    def _members(self, victim: str, tuning: str, benign: str) -> tuple[str, str, str]:
        base, _, seed, _ = parts(victim)
        robust = (f"{base}+{tuning}", f"{self.partner(base)}+{tuning}")
        return with_seed(robust[0], seed), with_seed(robust[1], seed), with_seed(benign, seed)

    def seed(self, name: str) -> int:
        """The seed that draws the images of a tuning or a gate."""
        seed = parts(name).seed
        return self.config.seed if seed is None else seed

    def source(self, base: str) -> str:
        """The source string of an untuned encoder."""
        if base == "bmp":
            return ssl_study.pretrained_source(self.config, "bmp", self.config.bmp, self.accelerator)
        folder = Path(self.config.zoo) / base / "encoder"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} not found; first run python -m reproduction.build_ssl_zoo --methods {base}"
            )
        return f"timm:local-dir:{folder}"

    @functools.cache  # noqa: B019 - one study lives as long as its process
    def encoder(self, name: str) -> Encoder:
        """A frozen encoder by name, tuned first where needed."""
        base, tuning, *_ = parts(name)
        encoder = self._tune(name, base, tuning) if tuning else load_encoder(self.source(base))
        return encoder.to(self.device).eval().requires_grad_(False)

    def _tune(self, name: str, base: str, tuning: str) -> Encoder:
        """One tuning of one encoder on ``data`` under a fresh head, which is stored with it."""
        config, options, seed = self.config, self.config.tunings[tuning], self.seed(name)
        images = ssl_study.whole(config.data, "train", config.image_size)
        public, validation_rows = ssl_study.public_rows(config)
        own = torch.arange(len(images) // 2, len(images))
        train = images.subset(own if options.get("half") == "own" else public).sample(config.n_tune, seed)
        if options.get("more"):
            train = joined([train, *self.more_images(seed)])
        validation = images.subset(validation_rows).sample(config.n_validation, seed)
        settings = TuneSettings(
            source=self.source(base),
            head=options.get("head", "mlp"),
            defence=options["defence"],
            defence_options=options.get("options", {}),
            settings=replace(config.train, seed=seed, **options.get("train", {})),
        )
        student, extra, folder = None, None, self.out / "tuned" / name
        if "after" in options and not (folder / TUNED_RECORD).is_file():
            stage_one = with_seed(f"{base}+{options['after']}", parts(name).seed)
            student, thawed = self._second_stage(stage_one, train, settings.settings.batch_size)
            extra = {"thawed": thawed}
        return tune(
            settings, train, validation, out=folder, accelerator=self.accelerator, student=student, extra=extra
        ).encoder

    def _second_stage(self, stage_one: str, train: LabelledImages, batch_size: int) -> tuple[Student, list[str]]:
        """The result of stage one with all but its least robust-critical layers frozen, and their names (Gen-AF)."""
        encoder = self.encoder(stage_one)
        head = load_head(self.out / "tuned" / stage_one / "head.safetensors")[0]
        student = Student(copy.deepcopy(encoder), head).to(self.device)
        critical = train.sample(self.config.n_critical, self.seed(stage_one))
        pgd = PGD(epsilon=8 / 255, steps=10, step_size=2 / 255)
        batches = critical.batches(batch_size)
        attacked = torch.cat([pgd(student.logits, images.to(self.device), labels) for images, labels in batches])
        labels = critical.labels.to(self.device)
        thawed = unfreeze_redundant(student, robustness_contributions(student, attacked, labels, batch_size=batch_size))
        return student, thawed

    def tuning_record(self, name: str) -> dict[str, Any]:
        """The record of a tuning: seconds, validation and so on."""
        record = read_json(self.out / "tuned" / name / TUNED_RECORD)
        return {**record, **{key: record["identity"][key] for key in ("defence", "data")}}

    # ---- the gate of ours -----------------------------------------------------------------------------------------

    def more_images(self, seed: int) -> list[LabelledImages]:
        """The images of ``more_data`` that a seed draws."""
        config = self.config
        return [
            ssl_study.whole(source, "train", config.image_size).sample(config.n_more, seed)
            for source in config.more_data
        ]

    def gate(self, victim: str) -> FeatureGate:
        """The gate of ours: trained on unlabelled tuning images, its thresholds from validation images of all tasks."""
        return self._gate(victim)[0]

    @functools.cache  # noqa: B019
    def _gate(self, victim: str) -> tuple[FeatureGate, dict[str, Any]]:
        config, seed = self.config, self.seed(victim)
        assert config.gate is not None
        settings = config.gate if parts(victim).seed is None else replace(config.gate, seed=seed)

        def train(cache: Path) -> tuple[FeatureGate, dict[str, Any]]:
            images = ssl_study.whole(config.data, "train", config.image_size)
            more = self.more_images(seed)  # as many images of ``data`` as of a further set
            n = max(map(len, more)) if more else config.n_tune
            public = images.subset(ssl_study.public_rows(config)[0]).sample(n, seed)
            robust, benign = (self.encoder(name) for name in self.gated_members(victim))
            return train_gate(
                benign,
                [robust],
                joined([public, *more]),
                settings,
                calibration={task: self.data(task)[1] for task in self.tasks},
                out=cache,
            )

        gate, record = ssl_study.kept_gate(self.out / "gates" / victim, settings, train)
        return gate.to(self.device), record

    @functools.cache  # noqa: B019
    def cap(self, victim: str) -> float:
        """The lowest cap of the benign weight that costs no clean accuracy on the validation images of all tasks."""
        models = {task: self._gated(victim, task, 1.0) for task in self.tasks}
        return harmless_cap([accuracy_lost(model, self.data(task)[1]) for task, model in models.items()])

    def gate_record(self, victim: str) -> dict[str, Any]:
        """How the gate of ours was made, and the cap of the benign weight."""
        record = self._gate(victim)[1]
        kept = ("rows", "seen_attacks", "mean_auroc", "thresholds", "false_alarms", "seconds")
        return {"cap": self.cap(victim), **{key: record[key] for key in kept if key in record}}

    def _gated(self, victim: str, task: str, cap: float) -> ZePAD:
        """Ours for a task, under a gate with a cap of the benign weight."""
        branches = [self.branch(task, name) for name in self.gated_members(victim)]
        gate, names = self.gate(victim), self.data(task)[2].class_names
        caps = {"zero_sacrifice": cap, "white_box": 0.0}
        return ssl_study.assemble(self.config, branches, self.branch(task, victim), names, gate, caps)

    # ---- data and heads ------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019
    def data(self, task: str) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
        """(train, validation, test) of a task."""
        return ssl_study.task_data(self.config, self.tasks[task])

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def branch(self, task: str, name: str) -> Branch:
        """An encoder with a clean head for a task, trained once."""
        config, encoder = self.config, self.encoder(name.removesuffix("="))
        train, path = self.data(task)[0], self.out / "heads" / task / f"{name}.safetensors"
        if name.endswith("="):
            path = self.out / "tuned" / name.removesuffix("=") / "head.safetensors"
        elif not path.is_file():
            features = encode_images(optimize_for_inference(encoder, config.image_size), train.images, 500)
            seed = parts(name).seed
            settings = config.head if seed is None else replace(config.head, seed=seed)
            head = fresh_head("mlp", encoder.feature_dim, len(train.class_names), settings.seed)
            train_head_on_features(head, features, train.labels, settings)
            write_head(path, head, train.class_names)
        base, tuning, *_ = parts(name)
        about = BranchConfig(
            name=name.replace("+", "_").replace("=", "_own_head").replace("@", "_seed_"),
            role="robust" if adversarial(name.removesuffix("=")) else "benign",
            source=self.source(base),
            adaptation="full" if tuning else "none",
            head="mlp",
            objective=config.tunings[tuning]["defence"] if tuning else "",
        )
        return Branch(about, encoder, load_head(path)[0]).to(self.device).eval().requires_grad_(False)

    def assembled(self, victim: str, members: tuple[str, ...], task: str) -> ZePAD:
        """The defence of a victim for a task as a model, next to the undefended victim."""
        if self.config.gate is not None and members == self.gated_members(victim):
            return self._gated(victim, task, self.cap(victim))
        branches = [self.branch(task, name) for name in members]
        names = self.data(task)[2].class_names
        return ssl_study.assemble(self.config, branches, self.branch(task, victim), names)

    # ---- evaluations ---------------------------------------------------------------------------------------------

    def eval_data(self, task: str, split: str = "test", n: int | None = None) -> EvalData:
        """The images of a task: at least ``n`` test images, if there are as many; with ``split`` "validation" the
        validation images in their place.
        """
        _, validation, test = self.data(task)
        if n is not None and n > len(test):
            test = ssl_study.test_images(self.config, self.tasks[task], n)
        return EvalData(validation if split == "validation" else test, validation, self._surrogate_images(task))

    def _surrogate_images(self, task: str) -> LabelledImages:
        """The attacker's images; for tasks other than ``data`` they may be those of another set."""
        config = self.config
        if config.surrogate_data is None or self.tasks[task] == config.data:
            return ssl_study.surrogate_images(config)
        images = ssl_study.whole(config.surrogate_data, "train", config.image_size)
        return images.sample(config.evaluation.n_surrogate, config.seed + 1)

    def subject(self, victim: str, lines: dict[str, Line], task: str, data: EvalData) -> Subject:
        """The lines of a table over shared encoders; the last one is the default, whose members are its branches."""
        names = dict.fromkeys(name for line in lines.values() for name in line.members if name != victim)
        members = {UNDEFENDED: self.branch(task, victim), **{name: self.branch(task, name) for name in names}}
        place = {victim: 0, **{name: index for index, name in enumerate(members)}}
        title, default = list(lines.items())[-1]
        gate = self.gate(victim) if default.gated else None
        others = [(name, line) for name, line in lines.items() if name not in (title, UNDEFENDED)]
        rows = [_row(title, default, place, RowKind.DEFAULT, gate)]
        rows += [_row(name, line, place, RowKind.BASELINE, gate) for name, line in others]
        rows.append(Row(UNDEFENDED, (0,), first_logits, RowKind.UNDEFENDED))
        if default.rule:
            rows += [Row(name, (place[name],), first_logits, RowKind.BRANCH) for name in default.members]
        return Subject(
            members=members,
            rows=tuple(rows),
            class_names=data.test.class_names,
            fusion=default.fusion(gate) if default.rule else None,
            detector=DetectorConfig(score=GATE_SCORE if gate else DetectorConfig().score) if default.rule else None,
            public_encoder=self.encoder(victim),
            gate=gate,
        )

    def evaluate(
        self, title: str, victim: str, lines: dict[str, Line], tasks: list[str], split: str = "test", **changes: Any
    ) -> Report:
        """Evaluate the lines of a table for a victim; perturbations are shared by all tables."""
        settings = replace(self.config.evaluation, **changes)
        return evaluate(
            models={f"{title}-{victim}": partial(self.subject, victim, lines)},
            tasks={task: self.eval_data(task, split, settings.n) for task in tasks},
            settings=settings,
            out=self._evaluations(split),
            resume=True,
        )

    def _evaluations(self, split: str = "test") -> Path:
        return self.out / "evaluations" / split

    def evaluation_folder(self, title: str, victim: str, task: str) -> Path:
        """Where an evaluation of a victim without a seed keeps the answers and perturbations of a task."""
        return self._evaluations() / f"{title}-{victim}" / task

    def perturbation(self, title: str, victim: str, task: str) -> Perturbation:
        """The first T1 perturbation of an evaluation."""
        attack = self.config.evaluation.universal[0]
        path = self.evaluation_folder(title, victim, task) / "perturbations" / f"{attack}@{UNDEFENDED}.safetensors"
        return Perturbation.load(path, self.config.evaluation.epsilon_universal)


def _row(name: str, line: Line, place: dict[str, int], kind: RowKind, gate: FeatureGate | None) -> Row:
    answer = FusedAnswer(line.fusion(gate)) if line.rule else first_logits
    return Row(name, tuple(place[member] for member in line.members), answer, kind, line.gated)
