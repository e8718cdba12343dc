#!/usr/bin/env python
"""Table 9: the embedded CLIP and the shipped defence, zero-shot: names and styles seen or not, prompt sets, LoRA ranks.

    python scripts/clip_table.py --out recipes/results --data DIR/imagenet20 --data DIR/tinyimagenet80 \\
        --data DIR/pacs:photo --data DIR/pacs:sketch
    python scripts/clip_table.py --small --out DIR      # seconds: shows that it runs

Writes clip.json and clip.md after every piece, and goes on where it was killed; perturbations and tuned adapters are
kept in --work. --data takes folders of parquet files or Hub names, with the split behind a colon (test without one); a
set with names that the text tower never read is split into the two halves. T1 perturbations are made once, on the
public encoder from clothing pictures, whatever the task: the attacker does not know it. T2 is one white-box PGD through
the whole model, so its column is an upper bound; scripts/demo attacks harder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _clip_names import UNSEEN, Names
from _clip_record import restrict
from dae_table import SOURCE, crafted
from torch import Tensor, nn
from tqdm.auto import tqdm

from zepad_mm import ZePAD
from zepad_mm.attacks import PGD, Perturbation
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.defences import make_defence
from zepad_mm.encoders import Encoder, LoraSettings, load_clip, streamlined
from zepad_mm.evaluation.metrics import share
from zepad_mm.files import read_json, write_json, write_text
from zepad_mm.heads import zero_shot_head
from zepad_mm.provenance import provenance
from zepad_mm.training import TrainSettings, Validation, build_student, fit, load_tuned, write_tuned

NAME = "clip"
PROMPT_SETS = ("single", "photo", "style")
THREATS = ("clean", "T1", "T2")
TRAINED_ON = ("clothing", "imagenet20", "tinyimagenet80")  # sets that the embedded CLIP saw training pictures of
DEFAULTS = {"n": 200, "n_surrogate": 1000, "attack_steps": 10, "tune_steps": 100, "batch_size": 32}
DEFAULTS |= {"n_validation": 128, "craft_steps": None}
SMALL = {"n": 4, "n_surrogate": 8, "attack_steps": 1, "tune_steps": 1, "batch_size": 4}
SMALL |= {"n_validation": 4, "craft_steps": 1}


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/results"), help="folder of the two result files")
    parser.add_argument("--work", type=Path, default=Path("outputs/clip"), help="folder of what was crafted and tuned")
    parser.add_argument("--data", action="append", default=[], metavar="SET[:SPLIT]", help="beside the embedded set")
    parser.add_argument("--prompts", default=",".join(PROMPT_SETS), help="prompt sets, by comma")
    parser.add_argument("--attacks", default="uapgd,feature_uap,adv_encoder", help="universal attacks of T1, by comma")
    parser.add_argument("--ranks", default="2,4,8,16", help="of the LoRA sweep, by comma")
    parser.add_argument("--epsilon-t1", type=float, default=10 / 255, help="L-inf budget of T1")
    parser.add_argument("--epsilon-t2", type=float, default=4 / 255, help="L-inf budget of T2 and of the tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="few pictures and steps: shows that it runs")
    for name in DEFAULTS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {DEFAULTS[name]}")
    options = parser.parse_args(args)
    for name, value in (SMALL if options.small else DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


@dataclass(frozen=True)
class Task:
    """Test pictures under their names, and what of them the embedded CLIP has seen."""

    name: str
    data: LabelledImages
    names_read: int  # class names that stand in a text of its training
    pictures: str  # "seen set" or "unseen set"

    @property
    def about(self) -> dict[str, Any]:
        return {"task": self.name, "n_classes": len(self.data.class_names)} | {
            "names_read": self.names_read,
            "pictures": self.pictures,
            "n": len(self.data),
        }


def tasks(options: argparse.Namespace) -> list[Task]:
    """The embedded set and those of --data; a set with held-out names as two tasks."""
    clothes = load_data("embedded", "validation", n=1).class_names
    read = {word.lower() for words in Names(clothes, clothes).synonyms for word in words}
    found = []
    for source in ("embedded:test", *options.data):
        folder, _, split = source.partition(":")
        data = load_data(folder, split or "test", 64)
        title = data.name if split in ("", "test") else f"{data.name} {split}"
        unseen = torch.tensor([name in UNSEEN for name in data.class_names])
        parts = [(title, torch.ones_like(unseen))]
        if bool(unseen.any()):
            parts = [(f"{title}, names read", ~unseen), (f"{title}, names never read", unseen)]
        pictures = "seen set" if data.name in TRAINED_ON else "unseen set"
        for name, keep in parts:
            part = restrict(data, keep).sample(options.n, options.seed)
            found.append(Task(name, part, sum(word.lower() in read for word in part.class_names), pictures))
    return found


def figures(mask: Tensor) -> dict[str, Any]:
    held = share(mask)
    return {"accuracy": held.value, "ci_low": held.interval[0], "ci_high": held.interval[1]}


@torch.no_grad()
def right(model: Callable[[Tensor], Tensor], data: LabelledImages, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(-1) for part in images.split(100)]) == data.labels


def score(
    model: Callable[[Tensor], Tensor],
    task: Task,
    perturbations: dict[str, Perturbation],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Accuracies of one model: clean, each T1 attack and their worst per picture, PGD. What is wrong clean stays so."""
    data = task.data
    clean = right(model, data, data.images)
    attacked = {name: clean & right(model, data, made(data.images)) for name, made in perturbations.items()}
    pgd = PGD(epsilon=options.epsilon_t2, steps=options.attack_steps)
    generator = torch.Generator().manual_seed(options.seed)
    parts = zip(data.images.split(64), data.labels.split(64), strict=True)
    found = torch.cat([pgd(model, images, labels, generator=generator) for images, labels in parts])
    worst = torch.stack([clean, *attacked.values()]).all(0)
    row = {"clean": figures(clean), "T1": figures(worst), "T2": figures(clean & right(model, data, found))}
    return row | {"T1_each": {name: figures(mask) for name, mask in attacked.items()}}


def tuned(rank: int, options: argparse.Namespace) -> tuple[Encoder, dict[str, Any]]:
    """The embedded CLIP by TeCoA through a LoRA adapter of this rank, the weights selected on validation pictures."""
    train = load_data("embedded", "train+surrogate", 64)
    validation = load_data("embedded", "validation", 64, options.n_validation, options.seed)
    student = build_student(SOURCE, train, "lora", lora=LoraSettings(rank=rank, alpha=2.0 * rank), seed=options.seed)
    steps = options.tune_steps
    settings = TrainSettings(
        steps=steps,
        batch_size=options.batch_size,
        lr_encoder=2e-3,
        lr_warmup_steps=steps // 20,
        epsilon_warmup_steps=steps // 4,
        validation_every=max(1, steps // 4),
        augment="flip_shift",
        channels_last=True,
        samples=0,
        seed=options.seed,
    )
    defence = make_defence("tecoa", {"epsilon": options.epsilon_t2, "attack_steps": 2, "clean_fraction": 0.25})
    out = options.work / f"rank{rank}"
    result = fit(student, train, validation, defence, settings, out=out / "run")
    trainable = sum(parameter.numel() for parameter in student.encoder.parameters() if parameter.requires_grad)
    assert isinstance(result.validation, Validation)
    record = {"rank": rank, "parameters": trainable, "steps": result.steps, "best_step": result.best_step}
    record |= {"seconds": round(result.seconds, 1), "validation": result.validation.to_dict()}
    write_tuned(out, student.encoder, record)
    return streamlined(load_tuned(out)), record


class Table:
    """The result files: pieces that are there already are not made again."""

    def __init__(self, options: argparse.Namespace, found: list[Task]) -> None:
        self.path = options.out / f"{NAME}.json"
        kept = {key: value for key, value in vars(options).items() if key not in ("out", "work", "data")}
        config = {**kept, "source": SOURCE, "tasks": [task.about for task in found]}
        self.record: dict[str, Any] = {"zero_shot": [], "lora": []}
        if self.path.is_file() and read_json(self.path)["meta"]["config"] == config:
            self.record = read_json(self.path)
        else:
            self.record["meta"] = provenance(seed=options.seed, config=config)

    def piece(self, part: str, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        """Add the row of ``key`` to ``part`` and write both files, unless it is there."""
        if any(key.items() <= row.items() for row in self.record[part]):
            return
        began = time.perf_counter()
        self.record[part].append({**key, **make(), "seed": self.record["meta"]["seed"]})
        self.record[part][-1]["wall_s"] = round(time.perf_counter() - began, 1)
        write_json(self.path, self.record)
        write_text(self.path.with_suffix(".md"), markdown(self.record))


def markdown(record: dict[str, Any]) -> str:
    """Both tables."""
    config, meta = record["meta"]["config"], record["meta"]
    t1, t2 = (f"{255 * config[name]:.3g}/255" for name in ("epsilon_t1", "epsilon_t2"))
    head = f"clean | T1, {t1} | T2, {t2} |"
    lines = [
        "# The embedded CLIP, zero-shot",
        "",
        f"Accuracy in % with 95 % Wilson intervals, seed {meta['seed']}. T1: the worst per picture of "
        f"{config['attacks'].replace(',', ', ')}, made on the public encoder from {config['n_surrogate']} clothing "
        f"pictures. T2: one white-box PGD through the whole model, {config['attack_steps']} steps, so an upper bound. "
        "Names read: how many of the class names stand in a text that the CLIP was trained on.",
        "",
        f"| pictures | names read | prompts | model | n | {head}",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["zero_shot"]:
        where = f"{row['task']} ({row['pictures']}) | {row['names_read']} of {row['n_classes']}"
        lines.append(f"| {where} | {row['prompts']} | {row['model']} | {row['n']} | {_cells(row)} |")
    if record["lora"]:
        lines += [
            "",
            f"LoRA by TeCoA at {t2} on clothing pictures, {config['tune_steps']} steps of {config['batch_size']} for "
            "every rank (alpha is twice the rank), weights selected on validation pictures, prompts `photo`: one tuned "
            "encoder alone, without a fusion. Short tunings: they order ranks, and are no match for the shipped "
            "branches. Step 0: no tuned weights were better on validation than the untuned ones.",
            "",
            f"| rank | trained parameters | step kept | tuning, s | pictures | n | {head}",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for row in record["lora"]:
        about = f"{row['rank']} | {row['parameters']:,} | {row['best_step']} | {row['seconds']:.0f} | {row['task']}"
        lines.append(f"| {about} | {row['n']} | {_cells(row)} |")
    foot = f"Commit {meta['commit']}, {meta['hardware']}; torch {meta['versions']['torch']}."
    return "\n".join([*lines, "", f"Written by scripts/clip_table.py. {foot}", ""])


def _cells(row: dict[str, Any]) -> str:
    return " | ".join(
        f"{100 * row[threat]['accuracy']:.1f} ({100 * row[threat]['ci_low']:.1f}-{100 * row[threat]['ci_high']:.1f})"
        for threat in THREATS
    )


def main(options: argparse.Namespace) -> Path:
    """Craft, score, tune and write; returns the path of the JSON file."""
    found = tasks(options)
    table = Table(options, found)
    encoder, text = load_clip(SOURCE)
    surrogate = load_data("embedded", "surrogate", 64, options.n_surrogate, options.seed).images
    crafting = argparse.Namespace(
        work=options.work, epsilon=options.epsilon_t1, seed=options.seed, steps=options.craft_steps
    )
    names = options.attacks.split(",")
    perturbations = {name: crafted(name, crafting, encoder, surrogate) for name in tqdm(names, desc="crafting")}
    plain, defence = streamlined(encoder), streamlined(ZePAD.from_pretrained("embedded"))
    prompt_sets = sorted(options.prompts.split(","), key=lambda prompts: prompts != "photo")  # the main column first
    for prompts, task in tqdm([(prompts, task) for prompts in prompt_sets for task in found], desc="zero-shot"):
        models = {
            "undefended": nn.Sequential(plain, zero_shot_head(text, task.data.class_names, prompts)),
            "zepad": defence.set_classes(task.data.class_names, prompts),
        }
        for name, model in models.items():
            key = {**task.about, "prompts": prompts, "model": name}
            table.piece("zero_shot", key, partial(score, model, task, perturbations, options))
    for rank in tqdm([int(rank) for rank in options.ranks.split(",")], desc="LoRA ranks"):
        missing = [task for task in found if not any(_is(row, rank, task) for row in table.record["lora"])]
        if not missing:
            continue
        adapted, record = tuned(rank, options)
        for task in missing:
            model = nn.Sequential(adapted, zero_shot_head(text, task.data.class_names))
            table.piece("lora", {**record, **task.about}, partial(score, model, task, perturbations, options))
    return table.path


def _is(row: dict[str, Any], rank: int, task: Task) -> bool:
    return {"rank": rank, **task.about}.items() <= row.items()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(main(parse()))
