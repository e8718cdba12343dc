#!/usr/bin/env python
"""Table 9: the embedded CLIP and the shipped defences, zero-shot: names and styles seen or not, prompts, baselines.

    python -m reproduction.clip_table --out results --data DIR/imagenet20 --data DIR/tinyimagenet80 \\
        --data DIR/pacs:photo --data DIR/pacs:sketch --tune-on outputs/embedded/pool
    python -m reproduction.clip_table --small --out DIR      # seconds: shows that it runs

Writes clip.json and clip.md after every piece, and goes on where it was killed; perturbations and tuned adapters are
kept in --work. --data takes folders of parquet files or Hub names, with the split behind a colon (test without one); a
set with names that the text tower never read is split into the two halves. The baselines (TeCoA, FARE, PMG-AFT; all
weights, and LoRA of several ranks) are tuned on --tune-on, e.g. what tools/build_zepad.py joined. T1
perturbations are made once, on the public encoder from clothing pictures, whatever the task: the attacker does not know
it. T2 is one white-box PGD through the whole model, so its column is an upper bound; scripts/demo attacks harder.
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
from torch import Tensor, nn
from tqdm.auto import tqdm

from reproduction.universal_attacks_table import SOURCE, crafted
from tools.clip_names import UNSEEN, Names
from tools.clip_record import restrict
from zepad_mm import ZePAD
from zepad_mm.attacks import PGD, Perturbation
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders import Encoder, LoraSettings, load_clip, optimize_for_inference
from zepad_mm.evaluation.metrics import share
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.training import TrainSettings, TuneSettings, load_tuned, tune
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.provenance import provenance

NAME = "clip"
PROMPT_SETS = ("single", "photo", "style")
THREATS = ("clean", "T1", "T2")
MODELS = {"embedded": "embedded", "general": Path(__file__).parents[1] / "recipes" / "models" / "general"}
BASELINES = {  # with two attack steps, as the shipped branches
    "tecoa": {"attack_steps": 2, "clean_fraction": 0.25},
    "fare": {"attack_steps": 2, "clean_weight": 0.5},
    "pmg_aft": {"attack_steps": 2, "attack_step_size": None},
}
RANKS_OF = "tecoa"  # the defence that all ranks are tried with; the others are tuned in full and by COMMON_RANK
COMMON_RANK = 8
TRAINED_ON = ("clothing", "imagenet20", "tinyimagenet80")  # sets that the embedded CLIP saw training pictures of
DEFAULTS = {"n": 200, "n_surrogate": 1000, "attack_steps": 10, "tune_steps": 100, "batch_size": 32}
DEFAULTS |= {"n_validation": 128, "craft_steps": None}
SMALL = {"n": 4, "n_surrogate": 8, "attack_steps": 1, "tune_steps": 1, "batch_size": 4}
SMALL |= {"n_validation": 4, "craft_steps": 1}


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the two result files")
    parser.add_argument("--work", type=Path, default=Path("outputs/clip"), help="folder of what was crafted and tuned")
    parser.add_argument("--data", action="append", default=[], metavar="SET[:SPLIT]", help="beside the embedded set")
    parser.add_argument("--prompts", default=",".join(PROMPT_SETS), help="prompt sets, by comma")
    parser.add_argument("--attacks", default="uapgd,feature_uap,adv_encoder", help="universal attacks of T1, by comma")
    parser.add_argument("--ranks", default="0,2,4,8,16", help="of the LoRA sweep, by comma; 0: all weights")
    parser.add_argument("--tune-on", default="embedded", metavar="SET", help="what baselines are tuned on")
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
            "names_in_training": self.names_read,
            "images": self.pictures,
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


def tuned(name: str, rank: int, options: argparse.Namespace) -> tuple[Encoder, dict[str, Any]]:
    """The embedded CLIP by a defence, through a LoRA adapter of this rank or, for 0, all of it; the last weights."""
    split = "train+surrogate" if options.tune_on == "embedded" else "train"
    train = load_data(options.tune_on, split, 64)
    validation = load_data(options.tune_on, "validation", 64, options.n_validation, options.seed)
    lora = LoraSettings(rank=max(1, rank), alpha=2.0 * max(1, rank))
    steps = options.tune_steps
    settings = TrainSettings(
        steps=steps,
        batch_size=options.batch_size,
        lr_encoder=1e-3 if rank else 3e-4,
        lr_warmup_steps=steps // 20,
        epsilon_warmup_steps=steps // 4,
        validation_every=steps,
        selection="last",  # FARE's first hundreds of steps lose to the untuned weights by the mean of both accuracies
        augment="flip_shift",
        channels_last=True,
        samples=0,
        seed=options.seed,
    )
    tuning = TuneSettings(
        source=SOURCE,
        adaptation="lora" if rank else "full",
        lora=lora,
        defence=name,
        defence_options={"epsilon": options.epsilon_t2, **BASELINES[name]},
        settings=settings,
    )
    out = options.work / f"{name}-{rank}"
    result = tune(tuning, train, validation, out=out)
    adapter = [parameter for key, parameter in result.encoder.named_parameters() if "lora_" in key]
    trained = adapter if rank else list(result.encoder.parameters())
    record = {"defence": name, "rank": rank, "parameters": sum(parameter.numel() for parameter in trained)}
    record |= {key: result.record[key] for key in ("steps", "seconds", "validation")}
    return optimize_for_inference(load_tuned(out)), record


class Table:
    """The result files: pieces that are there already are not made again."""

    def __init__(self, options: argparse.Namespace, found: list[Task]) -> None:
        self.path = options.out / f"{NAME}.json"
        kept = {key: value for key, value in vars(options).items() if key not in ("out", "work", "data")}
        kept["tune_on"] = Path(options.tune_on).name
        config = {**kept, "source": SOURCE, "tasks": [task.about for task in found]}
        self.record: dict[str, Any] = {"zero_shot": [], "baselines": []}
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
        where = f"{row['task']} ({row['images']}) | {row['names_in_training']} of {row['n_classes']}"
        lines.append(f"| {where} | {row['prompts']} | {row['model']} | {row['n']} | {_cells(row)} |")
    if record["baselines"]:
        lines += [
            "",
            f"Baselines at {t2}, {config['tune_steps']} steps of {config['batch_size']}, tuned on "
            f"{Path(config['tune_on']).name}, prompts `photo`: one tuned encoder alone, without a fusion; alpha is "
            "twice the rank. Short tunings: they order defences and ranks, and are no match for the shipped branches.",
            "",
            f"| defence | LoRA rank | trained parameters | tuning, s | pictures | n | {head}",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for row in record["baselines"]:
        how = f"{row['defence']} | {row['rank'] or 'all weights'}"
        about = f"{how} | {row['parameters']:,} | {row['seconds']:.0f} | {row['task']}"
        lines.append(f"| {about} | {row['n']} | {_cells(row)} |")
    foot = f"Commit {meta['commit']}, {meta['hardware']}; torch {meta['versions']['torch']}."
    return "\n".join([*lines, "", f"Written by reproduction/clip_table.py. {foot}", ""])


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
    plain = optimize_for_inference(encoder)
    defences = {name: optimize_for_inference(ZePAD.from_pretrained(where)) for name, where in MODELS.items()}
    prompt_sets = sorted(options.prompts.split(","), key=lambda prompts: prompts != "photo")  # the main column first
    for prompts, task in tqdm([(prompts, task) for prompts in prompt_sets for task in found], desc="zero-shot"):
        names = task.data.class_names
        models = {"undefended": nn.Sequential(plain, zero_shot_head(text, names, prompts))}
        models |= {name: defence.set_classes(names, prompts) for name, defence in defences.items()}
        for name, model in models.items():
            key = {**task.about, "prompts": prompts, "model": name}
            table.piece("zero_shot", key, partial(score, model, task, perturbations, options))
    ranks = [int(rank) for rank in options.ranks.split(",")]
    wanted = [(name, rank) for name in BASELINES for rank in ranks if name == RANKS_OF or rank in (0, COMMON_RANK)]
    for name, rank in tqdm(wanted, desc="baselines"):
        keys = [{"defence": name, "rank": rank, **task.about} for task in found]
        if all(any(key.items() <= row.items() for row in table.record["baselines"]) for key in keys):
            continue
        adapted, record = tuned(name, rank, options)
        for task in found:
            model = nn.Sequential(adapted, zero_shot_head(text, task.data.class_names))
            table.piece("baselines", {**record, **task.about}, partial(score, model, task, perturbations, options))
    return table.path


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(main(parse()))
