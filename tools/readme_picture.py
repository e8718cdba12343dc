#!/usr/bin/env python
"""Draw the picture of the README, and write its answers to results/readme_picture.json.

    python -m tools.readme_picture      # half a minute on one core

The shipped photos before and after an attack on the public encoder, with the answers of the undefended and of the
defended CLIP. All photos are shown, however they end. Run it again whenever another model ships.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.models.serialization import CONFIG, EMBEDDED_MODEL
from zepad_mm.serve.service import Service
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import ASSETS, read_json, write_json
from zepad_mm.utils.provenance import origin

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "results" / "readme_picture.json"
PICTURE = ROOT / "docs" / "images" / "readme.png"
PHOTOS = {"cat": "a cat", "coffee": "a cup of coffee", "rocket": "a rocket"}
LABELS = ("a cat", "a dog", "a cup of coffee", "a rocket")
ATTACK, LEVELS = "public", 4  # T1i at 4/255, as on the page of zepad serve
RIGHT, WRONG = "#0060a8", "#b34700"  # told apart by colour-blind readers; the mark before the answer says it too


def fingerprint() -> list[float]:
    """What tells the shipped model from another one."""
    values: list[float] = read_json(EMBEDDED_MODEL / CONFIG)["fingerprint"]
    return values


def answer(found: dict[str, Any], truth: str) -> dict[str, Any]:
    """The best labels of both models, with the suspicion of the defence."""
    evidence = found["evidence"]
    models = {"undefended": evidence["undefended"][0], "defended": found["labels"][0]}
    answers = {name: {**best, "right": best["label"] == truth} for name, best in models.items()}
    return {**answers, "suspicion": evidence["score"], "flagged": evidence["flagged"]}


def measure() -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """The record, and the photos before and after the attack."""
    classifier = RobustZeroShotClassifier.from_pretrained("embedded")
    service = Service(classifier)
    rows, images = [], []
    for photo, truth in PHOTOS.items():
        path = ASSETS / "photos" / f"{photo}.jpg"
        found = service.attack(path, LABELS, attack=ATTACK, levels=LEVELS, label=truth)
        rows.append({
            "photo": path.name, "truth": truth, "clean": answer(found.before, truth),
            "attacked": answer(found.after, truth),
        })  # fmt: skip
        images.append((found.clean, found.attacked))
    record = {
        "meta": {**origin(), "seed": 0, "config": {"labels": LABELS, "attack": ATTACK, "epsilon": LEVELS / 255}},
        "fingerprint": fingerprint(),
        "threshold": classifier.model.config.detector.threshold,
        "photos": rows,
    }
    return record, images


def draw(record: dict[str, Any], images: list[tuple[Tensor, Tensor]]) -> Figure:
    """Each photo twice, with the answers below."""
    figure = Figure(figsize=(11.5, 2.9))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.005, right=0.975, top=0.92, bottom=0.37, wspace=0.2)
    panels = figure.subplots(1, 2 * len(images))
    for index, (row, pair) in enumerate(zip(record["photos"], images, strict=True)):
        for offset, (kind, pixels) in enumerate(zip(("clean", "attacked"), pair, strict=True)):
            _panel(panels[2 * index + offset], kind, pixels, row[kind], record["threshold"])
    return figure


def _panel(panel: Axes, kind: str, pixels: Tensor, found: dict[str, Any], threshold: float | None) -> None:
    panel.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_title(kind, fontsize=11)
    for line, name in enumerate(("undefended", "defended")):
        best = found[name]
        text = f"{'✓' if best['right'] else '✗'} {best['label']}, {100 * best['score']:.0f} %"
        style: dict[str, Any] = {"transform": panel.transAxes, "fontsize": 9, "va": "top", "ha": "left"}
        panel.text(0, -0.05 - 0.26 * line, f"{name} CLIP", color="#555555", **style)
        panel.text(0, -0.16 - 0.26 * line, text, color=RIGHT if best["right"] else WRONG, weight="bold", **style)
    limit = "" if threshold is None else f" ({'above' if found['flagged'] else 'below'} {threshold:.1f})"
    panel.text(
        0, -0.58, f"suspicion {found['suspicion']:.1f}{limit}", transform=panel.transAxes, fontsize=9, va="top",
        ha="left", color="black",
    )  # fmt: skip


def caption(record: dict[str, Any]) -> str:
    """What the picture shows, in a sentence that holds for any answers."""
    rows, config = record["photos"], record["meta"]["config"]
    right = {
        (name, kind): sum(row[kind][name]["right"] for row in rows)
        for name in ("undefended", "defended")
        for kind in ("clean", "attacked")
    }
    flagged = sum(bool(row["attacked"]["flagged"]) for row in rows)
    before, after = (
        f"undefended {right['undefended', kind]}, defended {right['defended', kind]}" for kind in ("clean", "attacked")
    )
    return (
        f"The {len(rows)} shipped photos, before and after an attack on the public encoder that changes no pixel by "
        f"more than {255 * config['epsilon']:.0f}/255. Right before the attack: {before}; after it: {after}; {flagged} "
        f"of {len(rows)} flagged as attacked."
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    record, images = measure()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with replacing(PICTURE) as temporary:
        draw(record, images).savefig(temporary, format="png", dpi=110)
    write_json(RECORD, record)


if __name__ == "__main__":
    main()
