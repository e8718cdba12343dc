#!/usr/bin/env python
"""Accuracy against cost: the original network at several image sizes, before any training.

    python -m tools.wordnet_clip.sides --work DIR

DIR is the work folder of a build whose texts and images are prepared. Writes ``sides.json`` there, which the record
of the build includes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from tools.wordnet_clip.build import load_training
from tools.wordnet_clip.images import to_side
from tools.wordnet_clip.training import Recipe, Training
from tools.wordnet_clip.validation import imagenet_class, top1
from zepad_mm.utils.io import write_json

SIDES = (64, 96, 112, 128, 144, 160)
SAMPLE = 250  # validation images of each set, about


@torch.no_grad()
def side_table(training: Training) -> list[dict[str, float]]:
    """Rows {side, cost relative to 64 pixels, accuracies}.

    ``SET, 1,000 rows``: cosines of centred, projected features to all of the classifier's rows. ``SET, classifier``:
    the network's own answer. ``SET, prototypes``: among the WordNet prototypes of the set's names.
    """
    return [{"side": float(side), "cost": (side / 64) ** 2} | _accuracies(training, side) for side in SIDES]


def _accuracies(training: Training, side: int) -> dict[str, float]:
    teacher, found = training.teacher, {}
    answers = {}
    for source, images in training.images["validation"].items():
        stride = max(1, len(images.labels) // SAMPLE)
        parts = [teacher(to_side(part.float() / 255, side)) for part in images.pixels[::stride].split(125)]
        answers[source] = (torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts]), stride)
    mean = torch.cat([features for features, _, _ in answers.values()]).mean(0)
    for source, (features, logits, stride) in answers.items():
        labels = training.images["validation"][source].labels[::stride]
        image = F.normalize((features - mean) @ teacher.directions.T, dim=-1)
        if "imagenet" in source:
            label = imagenet_class(training, source)[labels]
            found[f"{source}, 1,000 rows"] = top1(image @ teacher.rows.T, label)
            found[f"{source}, classifier"] = top1(logits, label)
        words = [training.texts.entities[entity] for entity in training.texts.sets[source]]
        target = torch.tensor([int(training.texts.target[rows[0]]) if rows else -1 for rows in words])
        text = training.prototypes[target] * (target >= 0).unsqueeze(1)
        found[f"{source}, prototypes"] = top1(image @ text.T, labels)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="work folder of the build")
    args = parser.parse_args()
    write_json(args.work / "sides.json", side_table(load_training(args.work, Recipe())))


if __name__ == "__main__":
    main()
