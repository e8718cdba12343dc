#!/usr/bin/env python
"""Table 9 a: the embedded CLIP and the shipped defences, zero-shot, on seen and unseen class names, styles and prompts.

    python -m reproduction.clip_table --config reproduction/configs/clip.yaml --tune_on outputs/embedded/pool \\
        --data "[DIR/imagenet20, DIR/tinyimagenet80, DIR/pacs:photo, DIR/pacs:sketch]"
    python -m reproduction.clip_table --config reproduction/configs/clip_smoke.yaml      # seconds

One study of ``evaluate``: models with every prompt set, then baselines (TeCoA, FARE, PMG-AFT; all weights, and LoRA of
several ranks) tuned on ``tune_on``, e.g. the output of tools/joint_validation_pool.py; a second start resumes in --out.
T1 perturbations are crafted once, on the public encoder from clothing images: the attacker does not know the task.
``data`` takes folders of parquet files or Hub names, with the split after a colon (test without one); a data set with
class names that the text tower was not trained on is split in two. Writes clip.json and clip.md into --result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tools.wordnet_clip.names import NEVER_READ
from zepad_mm import ZePAD, evaluate
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders import Encoder, LoraSettings, load_clip, load_encoder
from zepad_mm.evaluation import EvalData, EvalSettings, Report, Subject, subject_of
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.training import TrainSettings, Tuned, TuneSettings, tune
from zepad_mm.utils.config import Config
from zepad_mm.utils.images import Resize
from zepad_mm.utils.io import write_json, write_text
from zepad_mm.utils.provenance import provenance
from zepad_mm.utils.text import interval_text, markdown_table

NAME = "clip"
SOURCE = "open_clip:embedded"
THREATS = ("clean", "T1", "T2")
DEFENCES = ("embedded",)  # names or folders of defended models
BASELINES: dict[str, dict[str, Any]] = {  # with two attack steps, as the shipped branches
    "tecoa": {"attack_steps": 2, "clean_fraction": 0.25},
    "fare": {"attack_steps": 2, "clean_weight": 0.5},
    "pmg_aft": {"attack_steps": 2, "attack_step_size": None},
}
SWEPT = "tecoa"  # the defence of the rank sweep; the others are tuned in full and with COMMON_RANK
COMMON_RANK = 8
# data sets in the training of the embedded CLIP, and all class names that it never read
TRAINED_ON = ("clothing", "imagenet20", "tinyimagenet80", "caltech69")
UNSEEN = tuple(name for names in NEVER_READ.values() for name in names)


@dataclass(frozen=True, kw_only=True)
class ClipTable(Config):
    """Settings of the table."""

    data: tuple[str, ...] = ()  # SET or SET:SPLIT, in addition to the embedded one
    prompts: tuple[str, ...] = ("photo", "single", "style")  # prompt sets, the main one first
    ranks: tuple[int, ...] = (0, 2, 4, 8, 16)  # of the LoRA sweep; 0: all weights
    tune_on: str = "embedded"  # data set of the baselines
    tune_steps: int = 100
    batch_size: int = 32
    n_validation: int = 128
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    out: str = "outputs/clip"  # folder of the study and of the tuned encoders
    result: str = "results"  # folder of the two result files


@dataclass(frozen=True)
class Task:
    """Test images with their class names, and what the embedded CLIP was trained on of them."""

    data: LabelledImages
    names_in_training: int  # class names that were not left out of its training texts
    images: str  # "seen set" or "unseen set"

    def about(self, name: str) -> dict[str, Any]:
        """The columns of the table that describe the task."""
        seen = {"names_in_training": self.names_in_training, "images": self.images}
        return {"task": name, "n_classes": len(self.data.class_names), **seen, "n": len(self.data)}


@cache
def _resize() -> Resize:
    """How images become what the embedded CLIP sees."""
    return load_encoder(SOURCE).preprocess


def load_tasks(config: ClipTable) -> dict[str, Task]:
    """The embedded data set and those of the configuration; one with held-out class names as two tasks."""
    tasks = {}
    for source in ("embedded:test", *config.data):
        folder, _, split = source.partition(":")
        data = load_data(folder, split or "test", _resize())
        title = data.name if split in ("", "test") else f"{data.name} {split}"
        unseen = torch.tensor([name in UNSEEN for name in data.class_names])
        parts = [(title, torch.ones_like(unseen))]
        if bool(unseen.any()):
            parts = [(f"{title}, names read", ~unseen), (f"{title}, names never read", unseen)]
        for name, keep in parts:
            part = data.keep_classes(keep).sample(config.evaluation.n, config.evaluation.seed)
            in_training = sum(word not in UNSEEN for word in part.class_names)
            tasks[name] = Task(part, in_training, "seen set" if data.name in TRAINED_ON else "unseen set")
    return tasks


@cache
def _tuning_images(source: str, n_validation: int, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images of the baselines, decoded once for all of them."""
    train = load_data(source, "train+surrogate" if source == "embedded" else "train", _resize())
    return train, load_data(source, "validation", _resize(), n_validation, seed)


def tune_baseline(config: ClipTable, defence: str, rank: int) -> Tuned:
    """The embedded CLIP tuned by a defence, with LoRA of this rank or, for 0, in full; tuned once, then loaded."""
    seed, steps = config.evaluation.seed, config.tune_steps
    train, validation = _tuning_images(config.tune_on, config.n_validation, seed)
    settings = TrainSettings(
        steps=steps,
        batch_size=config.batch_size,
        lr_encoder=1e-3 if rank else 3e-4,
        lr_warmup_steps=steps // 20,
        epsilon_warmup_steps=steps // 4,
        validation_every=steps,
        selection="last",  # the mean accuracy of FARE's first hundreds of steps is below that of the untuned weights
        augment="flip_shift",
        channels_last=True,
        samples=0,
        seed=seed,
    )
    tuning = TuneSettings(
        source=SOURCE,
        adaptation="lora" if rank else "full",
        lora=LoraSettings(rank=max(1, rank), alpha=2.0 * max(1, rank)),
        defence=defence,
        defence_options={"epsilon": config.evaluation.epsilon, **BASELINES[defence]},
        settings=settings,
    )
    return tune(tuning, train, validation, out=Path(config.out) / "tuned" / f"{defence}-{rank}")


def build_models(config: ClipTable) -> tuple[dict[str, Callable[..., Any]], dict[str, dict[str, Any]]]:
    """Name -> function of a task that returns the model; and name -> its columns in the table."""
    encoder, text = load_clip(SOURCE)
    defences = {name: ZePAD.from_pretrained(name) for name in DEFENCES}

    def undefended(prompts: str, task: str, data: EvalData) -> Any:
        return encoder, zero_shot_head(text, data.test.class_names, prompts)

    def defended(defence: ZePAD, prompts: str, task: str, data: EvalData) -> Subject:
        subject = subject_of(defence.set_classes(data.test.class_names, prompts))
        return replace(subject, rows=subject.rows[:1])

    @cache
    def tuned(defence: str, rank: int) -> Encoder:
        return tune_baseline(config, defence, rank).encoder

    def baseline(defence: str, rank: int, task: str, data: EvalData) -> Subject:
        head = zero_shot_head(text, data.test.class_names)
        return subject_of((tuned(defence, rank), head), public_encoder=encoder)

    models: dict[str, Callable[..., Any]] = {}
    columns: dict[str, dict[str, Any]] = {}
    for prompts in config.prompts:
        models[f"undefended, {prompts}"] = partial(undefended, prompts)
        columns[f"undefended, {prompts}"] = {"prompts": prompts, "model": "undefended"}
        for name, defence in defences.items():
            models[f"{name}, {prompts}"] = partial(defended, defence, prompts)
            columns[f"{name}, {prompts}"] = {"prompts": prompts, "model": name}
    for objective in BASELINES:
        for rank in config.ranks:
            if objective == SWEPT or rank in (0, COMMON_RANK):
                models[f"{objective}, rank {rank}"] = partial(baseline, objective, rank)
                columns[f"{objective}, rank {rank}"] = {"defence": objective, "rank": rank}
    return models, columns


def main(config: ClipTable) -> dict[str, Any]:
    """Craft, tune, evaluate and write both files; returns the record."""
    settings = replace(config.evaluation, threats=("T1", "T2"), pools=(), adaptive=(), diagnostics_n=0)
    surrogate = load_data("embedded", "surrogate", _resize(), settings.n_surrogate, settings.seed)
    validation = load_data("embedded", "validation", _resize(), settings.n_validation, settings.seed)
    tasks = load_tasks(config)
    data = {name: EvalData(task.data, validation, surrogate) for name, task in tasks.items()}
    models, columns = build_models(config)
    report = evaluate(models=models, tasks=data, settings=settings, out=config.out, resume=True)
    record: dict[str, Any] = {"zero_shot": [], "baselines": []}
    for name, about in columns.items():
        part = "zero_shot"
        if "defence" in about:
            part, tuned = "baselines", tune_baseline(config, about["defence"], about["rank"])
            about |= {"parameters": _count_trained(tuned.encoder, about["rank"])}
            about |= {key: tuned.record[key] for key in ("steps", "seconds", "validation")}
        for task, described in tasks.items():
            record[part].append({**described.about(task), **about, **_accuracies(report, name, task)})
    about_tasks = [task.about(name) for name, task in tasks.items()]
    kept = {key: value for key, value in config.to_dict().items() if key not in ("out", "result", "data")}
    kept |= {"tune_on": Path(config.tune_on).name, "source": SOURCE, "tasks": about_tasks}
    record["meta"] = provenance(seed=settings.seed, config=kept)
    path = Path(config.result) / f"{NAME}.json"
    write_json(path, record)
    write_text(path.with_suffix(".md"), markdown(record))
    return record


def _count_trained(encoder: Encoder, rank: int) -> int:
    return sum(tensor.numel() for name, tensor in encoder.named_parameters() if not rank or "lora_" in name)


def _accuracies(report: Report, model: str, task: str) -> dict[str, Any]:
    """Accuracy of a model on a task without an attack and in the worst case of each threat model, with intervals."""

    def interval(row: dict[str, Any]) -> dict[str, float]:
        return {key: row[key] for key in ("accuracy", "ci_low", "ci_high")}

    attacks = [row for row in report.rows if (row["model"], row["threat"], row["dataset"]) == (model, "T1", task)]
    each = {row["algorithm"]: interval(row) for row in attacks if row["attack"] != "worst" and not row["control"]}
    found: dict[str, Any] = {key: interval(report.row(model, key, dataset=task)) for key in THREATS}
    return found | {"T1_each": each}


def markdown(record: dict[str, Any]) -> str:
    """Both tables."""
    meta, config = record["meta"], record["meta"]["config"]
    settings = config["evaluation"]
    t1, t2 = (f"{255 * settings[name]:.3g}/255" for name in ("epsilon_universal", "epsilon"))
    columns = ["clean", f"T1, {t1}", f"T2, {t2}"]
    zero_shot, tuned = [], []
    for row in record["zero_shot"]:
        images = [f"{row['task']} ({row['images']})", f"{row['names_in_training']} of {row['n_classes']}"]
        zero_shot.append([*images, row["prompts"], row["model"], str(row["n"]), *_cells(row)])
    for row in record["baselines"]:
        tuning = [row["defence"], str(row["rank"] or "all weights"), f"{row['parameters']:,}", f"{row['seconds']:.0f}"]
        tuned.append([*tuning, row["task"], str(row["n"]), *_cells(row)])
    parts = [
        "# The embedded CLIP, zero-shot",
        f"Accuracy in % with 95 % Wilson intervals, seed {meta['seed']}. T1: worst case per image of "
        f"{', '.join(settings['universal'])}, crafted on the public encoder from {settings['n_surrogate']} clothing "
        f"images. T2: one white-box PGD through the whole model, {settings['steps']} steps, so an upper bound.",
        markdown_table(["images", "class names in training texts", "prompts", "model", "n", *columns], zero_shot),
        f"Baselines at {t2}, {config['tune_steps']} steps of {config['batch_size']}, tuned on {config['tune_on']}, "
        "prompts `photo`: one tuned encoder alone, without a fusion; alpha is twice the rank. These tunings are short: "
        "they rank defences and LoRA ranks, and are weaker than the shipped branches.",
        markdown_table(["defence", "LoRA rank", "trained parameters", "tuning, s", "images", "n", *columns], tuned),
        f"Written by `reproduction/clip_table.py`, commit {meta['commit']}, {meta['hardware']}, torch "
        f"{meta['versions']['torch']}.",
    ]
    return "\n\n".join(parts) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    return [interval_text(*(row[threat][key] for key in ("accuracy", "ci_low", "ci_high"))) for threat in THREATS]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(markdown(main(ClipTable.from_cli())))
