#!/usr/bin/env python
"""Write the CC0 clothing photos as the four embedded splits: surrogate, train, validation, test.

    python -m tools.build_data --clothing DIR

DIR contains ``train-*.parquet``, ``validation-*.parquet`` and ``test-*.parquet`` (columns image, label) of photos with
at least ``SIDE`` pixels a side. ``indices.json`` beside the splits says which source rows each split holds. It was
drawn once, stratified by class, and is kept: models that ship were trained and selected on these splits. They are:

- surrogate: training images of the public CLIP, and all images that attackers have;
- train: the defender's own images, for tuning the branches; unknown to the public CLIP and to attackers;
- validation: selects thresholds, checkpoints and constants of fusion rules;
- test: used in no training or selection. The original test split and images moved from the original train split.

Images of other splits that are near duplicates of a test image are an error.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import read_json, write_json, write_text

OUT = Path(__file__).parents[1] / "zepad_mm" / "assets" / "clothing"
SIDE = 128
QUALITY = 80  # WebP
NEAR = 0.03  # root mean square distance of 16-pixel thumbnails, pixels in [0, 1]

CARD = """# Clothing photos

Photos of ten kinds of clothes at {side} x {side} pixels, WebP quality {quality}, {size:.1f} MB in all. From the
*Clothing dataset* collected by Alexey Grigorev and contributors, dedicated to the public domain (CC0 1.0).

| split | images | used by |
|---|---|---|
| surrogate | {surrogate} | the public CLIP in training, and the attacker |
| train | {train} | the defender, to tune branches |
| validation | {validation} | thresholds, checkpoint selection, fusion constants |
| test | {test} | the final evaluation only |

No image of the other splits is a near duplicate of a test image. `indices.json` names the source rows.
Rebuilt by `python -m tools.build_data --clothing DIR`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", type=Path, required=True, help="folder with the three parquet files")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the four splits")
    arguments = parser.parse_args()
    tables = {split: _read(arguments.clothing, split) for split in ("train", "validation", "test")}
    parts: dict[str, list[tuple[str, int]]] = read_json(OUT / "indices.json")
    _check(parts, tables)
    names = [_plain(name) for name in tables["train"].features["label"].names]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    for part, rows in parts.items():
        columns = {
            "image": [{"bytes": _webp(tables[split][i]["image"]), "path": None} for split, i in rows],
            "label": [tables[split][i]["label"] for split, i in rows],
        }
        with replacing(arguments.out / f"{part}.parquet") as temporary:
            Dataset.from_dict(columns, features=features).to_parquet(str(temporary))
    sizes = {part: len(rows) for part, rows in parts.items()}
    write_json(arguments.out / "sizes.json", sizes)
    size = sum(path.stat().st_size for path in arguments.out.glob("*.parquet")) / 1e6
    card = CARD.format(side=SIDE, quality=QUALITY, size=size, **sizes)
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


def _check(parts: dict[str, list[tuple[str, int]]], tables: dict[str, Any]) -> None:
    """Exits unless each source row stands in one split, and no image of another split looks like a test image."""
    listed = sorted(tuple(row) for rows in parts.values() for row in rows)
    if listed != sorted((split, i) for split, table in tables.items() for i in range(len(table))):
        raise SystemExit("indices.json does not name each row of --clothing once; it is of another copy of the photos")
    thumbs = {split: np.stack([_thumb(row["image"]) for row in table]) for split, table in tables.items()}
    test = np.stack([thumbs[split][i] for split, i in parts["test"]])
    for part in parts.keys() - {"test"}:
        for split, i in parts[part]:
            if np.sqrt(((test - thumbs[split][i]) ** 2).mean(axis=1).min()) < NEAR:
                raise SystemExit(f"row {i} of {split}, in {part}, is a near duplicate of a test image")


def _thumb(image: Any) -> np.ndarray:
    small = image.convert("RGB").resize((16, 16), PILImage.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1) / 255


def _webp(image: Any) -> bytes:
    if min(image.size) < SIDE:
        raise SystemExit(f"expected photos of at least {SIDE} pixels a side, got {image.size}")
    buffer = io.BytesIO()
    resized = image.convert("RGB").resize((SIDE, SIDE), PILImage.Resampling.BICUBIC)
    resized.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
