#!/usr/bin/env python
"""Draw a figure for each threat model, docs/images/threats/, and write what they show to results/threat_figures.json.

    python -m tools.threat_figures && python -m tools.render_docs      # a minute on one core

The shipped photos are attacked on the shipped model, all of them by each attacker, and the figures show one. Run it
again whenever another model ships.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tools.readme_picture import LABELS, PHOTOS, RIGHT, ROOT, WRONG, answer, fingerprint
from tools.tutorials import small_png
from zepad_mm.attacks import APGD, PGD, FeatureUAP
from zepad_mm.attacks.base import round_within_budget
from zepad_mm.attacks.detector_aware import DetectorAware
from zepad_mm.classifier import RobustZeroShotClassifier, Task, pixels_of
from zepad_mm.data import load_embedded
from zepad_mm.evaluation import THREATS, EvalSettings
from zepad_mm.evaluation.threats import CLEAN, T1, T1B, T1I, T2, T3, ThreatModel
from zepad_mm.serve.service import Service
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import ASSETS, read_json, write_json
from zepad_mm.utils.provenance import origin
from zepad_mm.utils.text import budget_text

RECORD = ROOT / "results" / "threat_figures.json"
FIGURES = ROOT / "docs" / "images" / "threats"
MARKS = ("<!-- figures: written by tools/render_docs.py from results/threat_figures.json -->", "<!-- /figures -->")
SHOWN = "rocket"  # the photo in the figures
STEPS, WHITE_BOX_STEPS, UNIVERSAL_STEPS, SURROGATE = 40, 100, 60, 128
KNOWLEDGE = ("public encoder", "class names", "the defence's encoders", "fusion rule, gate, detector")


@dataclass(frozen=True)
class Attacker:
    """What a figure says of a threat model.

    Attributes:
        threat: the threat model.
        knows: how many of :data:`KNOWLEDGE`, by place.
        changes: what they add to an image.
        aim: what they want.
        heading: the same in a heading of the page.
    """

    threat: ThreatModel
    knows: tuple[int, ...]
    changes: str
    aim: str
    heading: str


ATTACKERS = (
    Attacker(CLEAN, (), "nothing", "nothing", "no attack"),
    Attacker(T1, (0,), "one change, for all images", "other features", "one change for all images, public encoder"),
    Attacker(T1B, (0, 2), "one change, for all images", "other features", "one change for all images, all encoders"),
    Attacker(T1I, (0, 1), "this image's own change", "a wrong answer", "each image, public encoder"),
    Attacker(T2, (0, 1, 2, 3), "this image's own change", "a wrong answer", "each image, everything known"),
    Attacker(T3, (0, 1, 2, 3), "this image's own change", "wrong and not flagged", "each image, not flagged"),
)


def epsilon_of(threat: ThreatModel) -> float:
    """The budget of a threat model by default, in pixels of [0, 1]; the smaller one of T1i, as of T2."""
    settings = EvalSettings()
    if threat is T1I:
        return min(settings.epsilons_transfer)
    return 0.0 if threat.budget is None else threat.budget(settings)[0]


def attack(threat: ThreatModel, service: Service, task: Task, images: Tensor, labels: Tensor) -> tuple[Tensor, str]:
    """The images under a threat model, in whole levels, and the attack in words."""
    epsilon, model = epsilon_of(threat), service.classifier.model
    if threat is CLEAN:
        return images, "none"
    if threat is T1:
        moved = service.perturbation.rescaled(epsilon)(images)
        return round_within_budget(images, moved, epsilon, "linf"), "the shipped perturbation"
    if threat is T1B:
        robust = [model.branch(b.name).encoder for b in model.config.branches if b.role == "robust"]
        surrogate, _ = load_embedded("surrogate", n=SURROGATE)
        craft = FeatureUAP(epsilon=epsilon, image_size=images.shape[-1], steps=UNIVERSAL_STEPS, batch_size=16)
        moved = craft.fit(robust, surrogate)(images)
        return round_within_budget(
            images, moved, epsilon, "linf"
        ), f"feature_uap on the robust branch, {craft.steps} steps"
    if threat is T3:
        spread = float(model.decide(load_embedded("validation", n=64)[0]).score.std())
        detector = model.config.detector
        assert detector.threshold is not None
        known, _ = attack(T2, service, task, images, labels)
        found = task.decide(known)
        done = (found.logits.argmax(-1) != labels) & ~model.is_adversarial(found)  # what T2 achieves counts here too
        aware = DetectorAware(
            fuse=task.fuse, score=lambda logits: task.fuse(logits).score, threshold=detector.threshold, spread=spread,
            epsilon=epsilon, steps=WHITE_BOX_STEPS, quantize=True,
        )  # fmt: skip
        moved = torch.where(done.view(-1, 1, 1, 1), known, aware(task.branch_logits, images, labels))
        return moved, f"that of T2, then detector_aware, selective, {WHITE_BOX_STEPS} steps"
    if threat is T2:
        strong = APGD(epsilon=epsilon, steps=WHITE_BOX_STEPS, loss="ce", quantize=True)
        return strong(task.defended, images, labels), f"apgd_ce, {WHITE_BOX_STEPS} steps"
    return PGD(epsilon=epsilon, steps=STEPS, quantize=True)(task.undefended, images, labels), f"pgd, {STEPS} steps"


def measure() -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """The record, and for each threat model the shown photo before and after."""
    classifier = RobustZeroShotClassifier.from_pretrained("embedded")
    service = Service(classifier)
    task = classifier.task(LABELS)
    geometry = classifier.model.undefended.encoder.preprocess
    paths = [ASSETS / "photos" / f"{photo}.jpg" for photo in PHOTOS]
    clean = torch.cat([(geometry.resize(pixels_of(path)[None]) * 255).round() / 255 for path in paths])
    truths = list(PHOTOS.values())
    labels = torch.tensor([LABELS.index(truth) for truth in truths])
    shown = list(PHOTOS).index(SHOWN)
    threats, images = {}, {}
    for attacker in ATTACKERS:
        threat = attacker.threat
        attacked, words = attack(threat, service, task, clean, labels)
        found = classifier(attacked, LABELS, return_evidence=True)
        photos = {
            path.name: {"truth": truth, **answer(one, truth)}
            for path, truth, one in zip(paths, truths, found, strict=True)
        }
        change = float((attacked - clean).abs().max())
        threats[threat.key] = {"attack": words, "epsilon": epsilon_of(threat), "change": change, "photos": photos}
        images[threat.key] = (clean[shown], attacked[shown])
    record = {
        "meta": {**origin(), "seed": 0, "config": {"labels": LABELS, "policy": classifier.model.config.policy}},
        "fingerprint": fingerprint(),
        "threshold": classifier.model.config.detector.threshold,
        "threats": threats,
    }
    return record, images


def draw(attacker: Attacker, record: dict[str, Any], pair: tuple[Tensor, Tensor]) -> Figure:
    """What the attacker knows, what they add to the photo, and what both models answer."""
    found = record["threats"][attacker.threat.key]
    clean, attacked = pair
    figure = Figure(figsize=(8.4, 1.75))
    FigureCanvasAgg(figure)
    words, photo, change, result, answers = figure.subplots(
        1, 5, gridspec_kw={"width_ratios": [1.5, 1, 1, 1, 1.25], "left": 0.01, "right": 0.995, "top": 0.88,
                           "bottom": 0.02, "wspace": 0.1},
    )  # fmt: skip
    factor = 0.5 / found["epsilon"] if found["epsilon"] else 1.0
    _image(photo, "photo", clean)
    grown = f"{factor:.0f} times" if found["epsilon"] else "nothing"
    _image(change, f"+ change, {grown}", 0.5 + factor * (attacked - clean))
    _image(result, "= what the models see", attacked)
    _knowledge(words, attacker)
    _answers(answers, found["photos"][f"{SHOWN}.jpg"], record["threshold"])
    return figure


def _image(panel: Axes, title: str, pixels: Tensor) -> None:
    panel.imshow(pixels.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_title(title, fontsize=8.5)


def _knowledge(panel: Axes, attacker: Attacker) -> None:
    panel.axis("off")
    panel.set_title("the attacker knows", fontsize=8.5, loc="left")
    style: dict[str, Any] = {"transform": panel.transAxes, "va": "top", "ha": "left", "fontsize": 8}
    for line, what in enumerate(KNOWLEDGE):
        known = line in attacker.knows
        panel.text(0, 0.97 - 0.15 * line, "●" if known else "○", color=RIGHT if known else "#888888", **style)
        panel.text(0.09, 0.97 - 0.15 * line, what, color="black" if known else "#888888", **style)
    panel.text(0, 0.30, f"adds: {attacker.changes}", color="black", **style)
    panel.text(0, 0.15, f"wants: {attacker.aim}", color="black", **style)


def _answers(panel: Axes, found: dict[str, Any], threshold: float | None) -> None:
    panel.axis("off")
    style: dict[str, Any] = {"transform": panel.transAxes, "va": "top", "ha": "left", "fontsize": 8.5}
    for line, name in enumerate(("undefended", "defended")):
        best = found[name]
        text = f"{'✓' if best['right'] else '✗'} {best['label']}, {100 * best['score']:.0f} %"
        panel.text(0, 0.98 - 0.36 * line, f"{name} CLIP", color="#555555", **style)
        panel.text(0, 0.82 - 0.36 * line, text, color=RIGHT if best["right"] else WRONG, weight="bold", **style)
    flagged = "" if threshold is None else "\nflagged" if found["flagged"] else "\nnot flagged"
    panel.text(0, 0.26, f"suspicion {found['suspicion']:.1f}{flagged}", color="black", **style)


def png(figure: Figure) -> bytes:
    """A small PNG."""
    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=100)
    with Image.open(whole) as image:
        return small_png(image)


def figures_block() -> str:
    """The figures with their captions, for docs/threats.md."""
    record = read_json(RECORD)
    parts = []
    for attacker in ATTACKERS:
        key = attacker.threat.key
        title = attacker.heading if attacker.threat is CLEAN else f"{key}: {attacker.heading}"
        picture = f"![The photo, the change, and the answers under {key}](images/threats/{key}.png)"
        parts += [f"### {title[:1].upper()}{title[1:]}", picture, caption(record, key)]
    return "\n\n".join(parts)


def caption(record: dict[str, Any], key: str) -> str:
    """What happened to all of the photos, in a sentence that holds for any answers."""
    found = record["threats"][key]
    rows = list(found["photos"].values())
    right = {name: sum(row[name]["right"] for row in rows) for name in ("undefended", "defended")}
    flagged = sum(bool(row["flagged"]) for row in rows)
    budget = "" if THREATS[key] is CLEAN else f" At {budget_text(found['epsilon'], 'linf')} ({found['attack']}):"
    start = f"{budget} of the {len(rows)} shipped photos".strip()
    too = ""
    if key == T3.key and not any(row["flagged"] for row in record["threats"][T2.key]["photos"].values()):
        too = " None of those of T2 is flagged either: this attacker has little left to do."
    return (
        f"{start[0].upper()}{start[1:]} the undefended CLIP answers {right['undefended']} right, the defended one "
        f"{right['defended']}; flagged: {flagged}.{too}"
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    record, images = measure()
    FIGURES.mkdir(parents=True, exist_ok=True)
    for attacker in ATTACKERS:
        key = attacker.threat.key
        with replacing(FIGURES / f"{key}.png") as temporary:
            Path(temporary).write_bytes(png(draw(attacker, record, images[key])))
    write_json(RECORD, record)


if __name__ == "__main__":
    main()
