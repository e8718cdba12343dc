#!/usr/bin/env python
"""Split the CC0 clothing photos into the four embedded splits: surrogate, train, validation, test.

    python -m tools.build_data --clothing DIR

DIR contains ``train-*.parquet``, ``validation-*.parquet`` and ``test-*.parquet`` (columns image, label). The splits:

- surrogate: training images of the public CLIP, and all images that attackers have;
- train: the defender's own images, for tuning the branches; unknown to the public CLIP and to attackers;
- validation: selects thresholds, checkpoints and constants of fusion rules;
- test: used in no training or selection. The original test split and images moved from the original train split; near
  duplicates of test images are dropped from the other splits.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import write_json, write_text

OUT = Path(__file__).parents[1] / "zepad_mm" / "assets" / "clothing"
SEED = 2026
MOVED_TO_TEST = 260
SURROGATE = 1200
NEAR = 0.03  # root mean square distance of 16-pixel thumbnails, pixels in [0, 1]
QUALITY = 85

CARD = """# Clothing photos

Photos of ten kinds of clothes at 64 x 64 pixels, JPEG quality {quality}. From the *Clothing dataset* collected by
Alexey Grigorev and contributors, dedicated to the public domain (CC0 1.0).

| split | images | used by |
|---|---|---|
| surrogate | {surrogate} | the public CLIP in training, and the attacker |
| train | {train} | the defender, to tune branches |
| validation | {validation} | thresholds, checkpoint selection, fusion constants |
| test | {test} | the final evaluation only |

{dropped} near duplicates of test images were dropped from the other splits. `indices.json` names the source rows.
Rebuilt by `python -m tools.build_data --clothing DIR`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", type=Path, required=True, help="folder with the three parquet files")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the four splits")
    arguments = parser.parse_args()
    tables = {split: _read(arguments.clothing, split) for split in ("train", "validation", "test")}
    names = tables["train"].features["label"].names
    order = _stratified(np.array(tables["train"]["label"]))
    parts = {
        "test": [("test", i) for i in range(len(tables["test"]))] + [("train", i) for i in order[:MOVED_TO_TEST]],
        "validation": [("validation", i) for i in range(len(tables["validation"]))],
        "surrogate": [("train", i) for i in order[MOVED_TO_TEST : MOVED_TO_TEST + SURROGATE]],
        "train": [("train", i) for i in order[MOVED_TO_TEST + SURROGATE :]],
    }
    thumbs = {split: np.stack([_thumb(row["image"]) for row in table]) for split, table in tables.items()}
    test = np.stack([thumbs[split][i] for split, i in parts["test"]])
    dropped = 0
    for part in ("validation", "surrogate", "train"):
        near = [np.sqrt(((test - thumbs[split][i]) ** 2).mean(axis=1).min()) < NEAR for split, i in parts[part]]
        parts[part] = [row for row, duplicate in zip(parts[part], near, strict=True) if not duplicate]
        dropped += int(sum(near))
    for part, rows in parts.items():
        columns = {
            "image": [{"bytes": _jpeg(tables[split][i]["image"]), "path": None} for split, i in rows],
            "label": [tables[split][i]["label"] for split, i in rows],
        }
        features = Features({"image": Image(), "label": ClassLabel(names=[_plain(name) for name in names])})
        with replacing(arguments.out / f"{part}.parquet") as temporary:
            Dataset.from_dict(columns, features=features).to_parquet(str(temporary))
    indices = {part: [[split, int(i)] for split, i in rows] for part, rows in parts.items()}
    write_json(arguments.out / "sizes.json", {part: len(rows) for part, rows in parts.items()} | {"dropped": dropped})
    write_text(arguments.out / "indices.json", json.dumps(indices) + "\n")
    card = CARD.format(quality=QUALITY, dropped=dropped, **{part: len(rows) for part, rows in parts.items()})
    write_text(arguments.out / "README.md", card)
    print(card)


def _plain(name: str) -> str:
    """The class name in plain words, for the text encoder."""
    return {"longsleeve": "long-sleeved shirt", "outwear": "jacket"}.get(name, name)


def _read(folder: Path, split: str) -> Any:
    files = sorted(str(path) for path in folder.glob(f"{split}-*.parquet"))
    if not files:
        raise SystemExit(
            f"no {split}-*.parquet in {folder}; pass the folder of the clothing parquet files as --clothing"
        )
    return Dataset.from_parquet(files)


def _stratified(labels: np.ndarray) -> list[int]:
    """The rows in an order in which every prefix has about the class proportions of the whole."""
    generator = np.random.default_rng(SEED)
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        rank[rows] = (np.arange(len(rows)) + generator.random()) / len(rows)
    return [int(row) for row in np.argsort(rank, kind="stable")]


def _thumb(image: Any) -> np.ndarray:
    small = image.convert("RGB").resize((16, 16), PILImage.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1) / 255


def _jpeg(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").resize((64, 64)).save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
