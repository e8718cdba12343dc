"""A zoo under the paper's protocol: tunings, heads, perturbations and logits, each made once and kept on disk.

An encoder has a name: that of the zoo (``simclr``), ``bmp`` for the benign one, and ``ENCODER+TUNING`` for what a
tuning of :attr:`Settings.tunings` made of it (``simclr+gen_af``); with ``=`` behind it, its head is the one that was
tuned along, not a clean one trained for the task. A condition is ``clean`` or ``ATTACK@ENCODERS``: made on those
encoders. From the logits of (task, encoder, condition) nearly every table is arithmetic; several processes may fill the
store side by side, all files are written atomically.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]

from reproduction import ssl_study as ssl_story  # noqa: E402
from zepad_mm.attacks import PGD, UNIVERSAL_ATTACKS, Perturbation  # noqa: E402
from zepad_mm.data import LabelledImages  # noqa: E402
from zepad_mm.defences import Student, robustness_contributions, unfreeze_redundant  # noqa: E402
from zepad_mm.encoders import Encoder, load_encoder, optimize_for_inference  # noqa: E402
from zepad_mm.models.branch import Branch, BranchConfig  # noqa: E402
from zepad_mm.training import (  # noqa: E402
    TuneSettings,
    encode_images,
    fresh_head,
    load_head,
    load_tuned,
    make_accelerator,
    train_head_on_features,
    tune,
    write_head,
)
from zepad_mm.training.artifacts import TUNED_RECORD  # noqa: E402
from zepad_mm.utils.io import read_json, read_tensors, write_tensors  # noqa: E402

Line, without_folders = ssl_story.Line, ssl_story.without_folders  # behind the path that they are found by


@dataclass(frozen=True, kw_only=True)
class Settings(ssl_story.Settings):
    """What the story has for one victim, for a zoo of them. ``downstream`` are the tasks, ``data`` is tuned on."""

    zoo: str = "outputs/ssl_zoo"  # folder of reproduction/build_ssl_zoo.py
    victims: list[str] = field(default_factory=lambda: ["w_mse", "byol", "simclr", "dino"])  # names in the zoo
    adv_au: str = "byol"  # the auxiliary encoder, a name in the zoo
    adv_au_for_itself: str = "nnclr"  # where the victim is the auxiliary encoder
    more_adv_au: list[str] = field(default_factory=list)  # further ones, for the table of their number
    # name -> defence, options, head, train, half (public or own), after (a tuning: this is Gen-AF's second stage of it)
    tunings: dict[str, dict[str, Any]] = field(default_factory=dict)
    n_critical: int = 1000  # tuning pictures that the second stage ranks layers by
    tuning: str = "gen_af"  # the paper's
    our_tuning: str = "fare"  # ours
    other_tuning: str = "half_clean"  # of the auxiliary encoder where the two differ
    labelled_tuning: str = "fare_labels"  # a candidate for ours
    our_bmp: str = "bmp+clean_own"  # the benign encoder of ours
    attacks: dict[str, int] = field(default_factory=lambda: {"adv_encoder": 60, "uapgd": 150})  # T1: name -> steps
    family_steps: int = 100  # of T1b's feature_uap
    studied: list[str] = field(default_factory=lambda: ["simclr"])  # victims of every table but the main one
    n_selection: int = 200  # validation pictures that the fusion rule is chosen on
    evaluation: dict[str, Any] = field(default_factory=dict)  # EvalSettings of the white-box table


def name_of(source: str) -> str:
    """The short name of a task."""
    return Path(source).name


class Study:
    """Everything that the tables are made of."""

    def __init__(self, config: Settings) -> None:
        self.config, self.out = config, Path(config.out)
        self.accelerator = make_accelerator()
        self.device = self.accelerator.device
        self.tasks = {name_of(source): source for source in config.downstream}

    def partner(self, victim: str) -> str:
        """The auxiliary encoder that stands beside a victim."""
        return self.config.adv_au_for_itself if victim == self.config.adv_au else self.config.adv_au

    def defended(self, victim: str) -> tuple[str, str, str]:
        """The three encoders of the paper's defence of a victim."""
        how = self.config.tuning
        return f"{victim}+{how}", f"{self.partner(victim)}+{how}", "bmp"

    def ours(self, victim: str) -> tuple[str, str, str]:
        """The three encoders of ours: another tuning, beside a benign encoder with local labels."""
        how = self.config.our_tuning
        return f"{victim}+{how}", f"{self.partner(victim)}+{how}", self.config.our_bmp

    def labelled(self, victim: str) -> tuple[str, str, str]:
        """Ours, tuned by FARE with labels beside the distance."""
        how = self.config.labelled_tuning
        return f"{victim}+{how}", f"{self.partner(victim)}+{how}", self.config.our_bmp

    def mixed(self, victim: str) -> tuple[str, str, str]:
        """Ours, with the auxiliary encoder tuned by another objective: two robust encoders that fail differently."""
        return (self.ours(victim)[0], f"{self.partner(victim)}+{self.config.other_tuning}", self.config.our_bmp)

    def source(self, base: str) -> str:
        """The source string of an untuned encoder."""
        if base == "bmp":
            return ssl_story.source_of(self.config, "bmp", self.accelerator)
        folder = Path(self.config.zoo) / base / "encoder"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there; first: python -m reproduction.build_ssl_zoo --methods {base}"
            )
        return f"timm:local-dir:{folder}"

    @functools.cache  # noqa: B019 - one study lives as long as its process
    def encoder(self, name: str) -> Encoder:
        """A frozen encoder by name, tuned first where it is not there yet."""
        base, _, tuning = name.partition("+")
        if not tuning:
            encoder = load_encoder(self.source(base))
        else:
            folder = self.out / "tuned" / name
            if not (folder / TUNED_RECORD).is_file():
                self._tune(base, tuning, folder)
            encoder = load_tuned(folder)
        return encoder.to(self.device).eval().requires_grad_(False)

    def _tune(self, base: str, tuning: str, folder: Path) -> None:
        """One tuning of one encoder on ``data`` under a fresh MLP head, which stays beside it."""
        config, about = self.config, dict(self.config.tunings[tuning])
        pool = ssl_story.whole(config.data, "train", config.image_size)
        public, validation_rows = ssl_story.public_rows(config)
        own = torch.arange(len(pool) // 2, len(pool))
        train = pool.subset(own if about.get("half") == "own" else public).sample(config.n_tune, config.seed)
        validation = pool.subset(validation_rows).sample(config.n_validation, config.seed)
        settings = replace(config.train, **about.get("train", {}))
        student, thawed = None, None
        if "after" in about:
            student, thawed = self._second_stage(f"{base}+{about['after']}", train, settings.batch_size)
        tuning = TuneSettings(
            source=self.source(base),
            head=about.get("head", "mlp"),
            defence=about["defence"],
            defence_options=about.get("options", {}),
            settings=replace(settings, seed=config.seed),
        )
        extra = {"thawed": thawed}
        tune(tuning, train, validation, out=folder, accelerator=self.accelerator, student=student, extra=extra)

    def _second_stage(self, stage_one: str, train: LabelledImages, batch_size: int) -> tuple[Student, list[str]]:
        """What stage one left, all but its least robust-critical layers frozen, and the names of those (Gen-AF)."""
        encoder = self.encoder(stage_one)
        head = load_head(self.out / "tuned" / stage_one / "head.safetensors")[0]
        student = Student(copy.deepcopy(encoder), head).to(self.device)
        pictures = train.sample(self.config.n_critical, self.config.seed)
        pgd, parts = PGD(epsilon=8 / 255, steps=10, step_size=2 / 255), pictures.batches(batch_size)
        attacked = torch.cat([pgd(student.logits, images.to(self.device), labels) for images, labels in parts])
        labels = pictures.labels.to(self.device)
        thawed = unfreeze_redundant(student, robustness_contributions(student, attacked, labels, batch_size=batch_size))
        return student, thawed

    def tuning_record(self, name: str) -> dict[str, Any]:
        """What the tuning of an encoder left: seconds, validation and so on."""
        return read_json(self.out / "tuned" / name / TUNED_RECORD)

    @functools.cache  # noqa: B019
    def data(self, task: str) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
        """(train, validation, test) of a task."""
        return ssl_story.task_data(self.config, self.tasks[task])

    def pictures(self, task: str, split: str) -> LabelledImages:
        """The test or the validation pictures of a task."""
        return self.data(task)[("train", "validation", "test").index(split)]

    def surrogate(self) -> LabelledImages:
        """The attacker's pictures, from the public half; their labels are not used."""
        config = self.config
        pictures = ssl_story.whole(config.data, "train", config.image_size).subset(ssl_story.public_rows(config)[0])
        return pictures.sample(config.n_surrogate, config.seed + 1)

    def perturbation(self, condition: str) -> Perturbation:
        """The perturbation of a condition, crafted once."""
        path = self.out / "perturbations" / f"{condition}.safetensors"
        config = self.config
        if not path.is_file():
            name, _, known = condition.partition("@")
            encoders = {key: optimize_for_inference(self.encoder(key), config.image_size) for key in known.split(",")}
            attack = UNIVERSAL_ATTACKS.get(name)(
                epsilon=config.universal_epsilon,
                steps=config.attacks.get(name, config.family_steps),
                image_size=config.image_size,
                seed=config.seed,
            )
            attack.fit(encoders, self.surrogate().images.to(self.device)).save(path)
        return Perturbation.load(path, config.universal_epsilon)

    def public(self, victim: str) -> list[str]:
        """The conditions of T1: every attack on the untouched victim."""
        return [f"{attack}@{victim}" for attack in self.config.attacks]

    def family(self, victim: str) -> list[str]:
        """The conditions of T1b: made on the benign encoder, and on all three of the paper's defence and of ours."""
        return [
            "feature_uap@bmp",
            *(f"feature_uap@{','.join(trio)}" for trio in (self.defended(victim), self.ours(victim))),
        ]

    @functools.lru_cache(maxsize=24)  # noqa: B019
    def branch(self, task: str, name: str) -> Branch:
        """An encoder with a clean head for a task, trained once."""
        config, encoder = self.config, self.encoder(name.removesuffix("="))
        train, path = self.data(task)[0], self.out / "heads" / task / f"{name}.safetensors"
        if name.endswith("="):
            path = self.out / "tuned" / name.removesuffix("=") / "head.safetensors"
        elif not path.is_file():
            features = encode_images(optimize_for_inference(encoder, config.image_size), train.images, 500)
            fresh = fresh_head("mlp", encoder.feature_dim, len(train.class_names), config.head.seed)
            train_head_on_features(fresh, features, train.labels, config.head)
            write_head(path, fresh, train.class_names)
        head = load_head(path)[0]
        base, _, tuning = name.removesuffix("=").partition("+")
        about = BranchConfig(
            name=name.replace("+", "_").replace("=", "_own_head"),
            role="benign" if base == "bmp" or not tuning else "robust",
            source=self.source(base),
            adaptation="full" if tuning else "none",
            head="mlp",
            objective=self.config.tunings[tuning]["defence"] if tuning else "",
        )
        return Branch(about, encoder, head).to(self.device).eval().requires_grad_(False)

    def logits(self, task: str, name: str, condition: str = "clean", split: str = "test") -> Tensor:
        """(n, C) of the task's test pictures, or of its validation pictures, under a condition."""
        path = self.out / "logits" / task / name / f"{split}-{condition}.safetensors"
        if not path.is_file():
            pictures = self.pictures(task, split).images
            if condition != "clean":
                pictures = self.perturbation(condition)(pictures)
            write_tensors(path, {"logits": self.answers(self.branch(task, name), pictures)})
        return read_tensors(path)[0]["logits"]

    @torch.no_grad()
    def answers(self, branch: Branch, pictures: Tensor) -> Tensor:
        """(n, C) in batches, on the CPU."""
        fast = optimize_for_inference(branch, self.config.image_size)
        return torch.cat([fast(batch.to(self.device)).cpu() for batch in pictures.split(250)])
