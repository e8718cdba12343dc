#!/usr/bin/env python
"""Zero-shot accuracy of a CLIP on test images: top-1 and top-5, six templates, one row for each set.

    python -m tools.wordnet_clip.measure --data-root DIR --clip open_clip:local-dir:FOLDER --out rows.json

Sets that are not below DIR are left out. Run it once, on a CLIP that is final: these images choose nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from tools.wordnet_clip.names import NEVER_READ
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders import load_clip
from zepad_mm.utils.io import write_json

# set, split, how many images (None: all), what it is
SETS: tuple[tuple[str, str, int | None, str], ...] = (
    ("imagenet_samples", "test", None, "ImageNet photos, 1,000 names"),
    ("caltech69", "test", None, "caltech69 test, 69 names"),
    ("imagenet20", "test", None, "imagenet20 test, 20 names"),
    ("clothing144", "test", None, "clothing144 test, 10 names"),
    ("tinyimagenet80", "test", 2000, "tinyimagenet80 test, 80 names"),
    ("cifar10", "test", 2000, "CIFAR-10 test, 10 names (held-out set)"),
    ("pacs", "photo", None, "PACS photo, 7 names (held-out set)"),
    ("pacs", "art_painting", 500, "PACS art_painting, 7 names (held-out set)"),
    ("pacs", "cartoon", 500, "PACS cartoon, 7 names (held-out set)"),
    ("pacs", "sketch", 500, "PACS sketch, 7 names (held-out set)"),
)


@torch.no_grad()
def measure(data_root: Path, source: str) -> list[dict[str, Any]]:
    """Rows {data, n, accuracy, top5, ci_low, ci_high}; names that were never read have rows of their own."""
    encoder, text = load_clip(source)
    rows = []
    for name, split, n, title in tqdm(SETS, desc="test"):
        if not (data_root / name).is_dir():
            continue
        data = load_data(str(data_root / name), split, image_size=encoder.preprocess, n=n)
        classes = text.class_embeddings(data.class_names, "photo")
        features = torch.cat([encoder(images) for images, _ in data.batches(128)])
        logits = torch.nn.functional.normalize(features, dim=-1) @ classes.T
        rows.append(_row(title, logits, data.labels))
        never = torch.tensor([word in NEVER_READ.get(name, ()) for word in data.class_names])
        if never.any():
            rows += _never_read(title, logits, data, never)
    return rows


def _never_read(title: str, logits: Tensor, data: LabelledImages, never: Tensor) -> list[dict[str, Any]]:
    shown = never[data.labels]
    among = (never.cumsum(0) - 1)[data.labels[shown]]
    names = title.split(", ", maxsplit=1)[0]
    return [
        _row(f"{names}, images of {int((~never).sum())} names read, among all", logits[~shown], data.labels[~shown]),
        _row(f"{names}, images of {int(never.sum())} names never read, among all", logits[shown], data.labels[shown]),
        _row(f"{names}, {int(never.sum())} names never read, among these", logits[shown][:, never], among),
    ]


def _row(title: str, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    top = logits.topk(min(5, logits.shape[1]), dim=-1).indices == labels.unsqueeze(1)
    hits = int(top[:, 0].sum())
    return accuracy_row(title, hits, len(labels)) | {"top5": int(top.sum()) / len(labels)}


def accuracy_row(title: str, hits: int, n: int) -> dict[str, Any]:
    """Row {data, n, accuracy, ci_low, ci_high} with the 95 % Wilson interval."""
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    ends = {"ci_low": float(interval.low), "ci_high": float(interval.high)}
    return {"data": title, "n": n, "accuracy": hits / n, **ends}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the parquet sets")
    parser.add_argument("--clip", default="open_clip:embedded", help="source of the CLIP")
    parser.add_argument("--out", type=Path, help="JSON file of the rows")
    args = parser.parse_args()
    rows = measure(args.data_root, args.clip)
    for row in rows:
        print(f"{row['data']:70s} {row['n']:5d} {100 * row['accuracy']:5.1f} (top-5 {100 * row['top5']:5.1f})")
    if args.out:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
