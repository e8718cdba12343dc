#!/usr/bin/env python
"""The gate over ten data sets: clean accuracy, attacks made on the public encoder, detection, and the white box.

    python -m reproduction.gate_study --model FOLDER --data-root DIR --out results/gate.json
    python -m reproduction.gate_study --clip SOURCE --data-root DIR --craft DIR/perturbations   # perturbations alone

DIR holds the parquet folders of the sets. Each image is attacked once; the features of both encoders then give the
answers of every operating point and of every gate (``--gates``: further gates of other seeds). A set that is finished
is kept in the folder beside the record, so that a killed run continues.

- T1: universal perturbations at 10/255 and patches, made on the public encoder from surrogate images.
- T1i: attacks on each image at 2, 4 and 8 of 255, made on the public encoder, which do not know the defence.
- T2: APGD on cross-entropy, then targeted APGD, through the whole model, for each operating point, and the robust
  branch alone.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from zepad_mm import ZePAD
from zepad_mm.attacks import (
    APGD,
    PGD,
    UNIVERSAL_ATTACKS,
    Attack,
    DiverseInput,
    MomentumIterative,
    Perturbation,
    TranslationInvariant,
    frozen,
)
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.data.corruptions import CORRUPTIONS, corrupt
from zepad_mm.encoders import load_encoder
from zepad_mm.models.branch import Branch
from zepad_mm.models.gate import FeatureGate
from zepad_mm.utils.io import read_json, write_json
from zepad_mm.utils.provenance import check_identity, provenance
from zepad_mm.utils.seeding import derived_generator, seeded_generator

log = logging.getLogger(__name__)

# name -> data set below the data root (or "embedded") and its split
SETS = {
    "clothing": ("embedded", "test"),
    "imagenet20": ("imagenet20", "test"),
    "tinyimagenet80": ("tinyimagenet80", "test"),
    "caltech69": ("caltech69", "test"),
    "imagenet_samples": ("imagenet_samples", "test"),
    "pacs_photo": ("pacs", "photo"),
    "pacs_art": ("pacs", "art_painting"),
    "pacs_cartoon": ("pacs", "cartoon"),
    "pacs_sketch": ("pacs", "sketch"),
    "cifar10": ("cifar10", "test"),
}
UNIVERSAL = ("adv_encoder", "feature_uap", "uapgd", "ssp", "x_transfer", "etu", "l4a_base")
PATCHES = ("adv_encoder_patch",)
UNIVERSAL_EPSILON = 10 / 255
EPSILONS = (2, 4, 8)  # of 255, of T1i
WHITE_BOX = 4 / 255
WHITE_BOX_SETS = ("clothing", "imagenet20", "caltech69", "tinyimagenet80")
CAPS = (0.0, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.8, 1.0)  # of the frontier
FALSE_ALARMS = 0.05


def transfer_attacks(epsilon: float) -> dict[str, Attack]:
    """The attacks of T1i: on the margin of the public model, each to its last step."""
    return {
        "pgd": PGD(epsilon=epsilon, steps=20, stop_when_wrong=False),
        "apgd": APGD(epsilon=epsilon, steps=20, stop_when_wrong=False),
        "mi": MomentumIterative(epsilon=epsilon, stop_when_wrong=False),
        "di": DiverseInput(epsilon=epsilon, stop_when_wrong=False),
        "ti": TranslationInvariant(epsilon=epsilon, stop_when_wrong=False),
    }


def strong_attacks(epsilon: float, quick: bool) -> tuple[Attack, ...]:
    """The attacks of T2, cheap ones first; each takes the images that the ones before left right."""
    factor = 5 if quick else 1
    return (
        PGD(epsilon=epsilon, steps=10),
        APGD(epsilon=epsilon, loss="ce", steps=100 // factor),
        APGD(epsilon=epsilon, loss="targeted", steps=100 // factor, targets=9),
    )


@dataclass(frozen=True)
class Seen:
    """What the encoders say of some images: features of the benign and robust branch (n, D), logits (n, C) of both."""

    benign: Tensor
    robust: Tensor
    benign_logits: Tensor
    robust_logits: Tensor


class Study:
    """One model with its gates on one data set."""

    def __init__(self, model: ZePAD, gates: dict[str, FeatureGate], data: LabelledImages, batch: int) -> None:
        self.model, self.gates, self.batch = model.set_classes(data.class_names), gates, batch
        self.device = model.device
        self.images, self.labels = data.images.to(self.device), data.labels.to(self.device)
        names = [branch.name for branch in model.config.branches]
        self.benign = model.branch(names[model.benign.index(True)])
        self.robust = model.branch(names[model.benign.index(False)])
        self.undefended = partial(_answers, self.benign)

    @torch.no_grad()
    def look(self, images: Tensor) -> Seen:
        """What both branches say."""
        parts = []
        for batch in images.split(self.batch):
            a, b = self.benign.encoder(batch), self.robust.encoder(batch)
            parts.append((a, b, self.benign.logits(a), self.robust.logits(b)))
        return Seen(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def suspicion(self, seen: Seen) -> dict[str, Tensor]:
        """Name of each gate -> z (n,)."""
        with torch.no_grad():
            return {name: gate(seen.benign, [seen.robust]) for name, gate in self.gates.items()}

    def right(self, logits: Tensor) -> float:
        """Accuracy of logits (n, C)."""
        return _share(logits.argmax(-1) == self.labels)

    def fused(self, seen: Seen, gate: FeatureGate, z: Tensor, cap: float) -> Tensor:
        """Probabilities (n, C) with the benign weight of a gate."""
        weight = (cap * torch.sigmoid(gate.config.sharpness * (gate.config.calibrated_threshold - z))).unsqueeze(1)
        return weight * seen.benign_logits.softmax(-1) + (1 - weight) * seen.robust_logits.softmax(-1)

    def row(self, threat: str, attack: str, seen: Seen, clean: dict[str, Tensor], **about: Any) -> dict[str, Any]:
        """Accuracies of both branches and of each gate by cap; detection against the clean images' z."""
        row: dict[str, Any] = {"threat": threat, "attack": attack, **about}
        row |= {"undefended": self.right(seen.benign_logits), "robust": self.right(seen.robust_logits), "gates": {}}
        for name, z in self.suspicion(seen).items():
            gate = self.gates[name]
            found: dict[str, Any] = {
                "by_cap": [self.right(self.fused(seen, gate, z, cap)) for cap in CAPS],
                "flagged": _share(z > gate.config.calibrated_threshold),
            }
            if clean:
                found["auroc"] = _auroc(clean[name], z)
            row["gates"][name] = found
        return row

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True)

    def attacked(self, attack: Attack, seed: int) -> Tensor:
        """The images under an attack on the public model."""
        with frozen(self.benign):
            parts = [
                attack(self.undefended, images, labels, generator=derived_generator(seed, number))
                for number, (images, labels) in enumerate(self.batches())
            ]
        return torch.cat(parts)

    def white_box(self, answers: Callable[[Tensor], Tensor], attacks: Sequence[Attack], n: int, seed: int) -> list[int]:
        """How many of the first n images are still right: clean, then after each attack."""
        images, labels = self.images[:n], self.labels[:n]
        kept = []
        with torch.no_grad():
            right = torch.cat([answers(few).argmax(-1) for few in images.split(self.batch)]) == labels
        kept.append(int(right.sum()))
        for number, attack in enumerate(attacks):
            rows = right.nonzero().squeeze(1)
            for few in rows.split(self.batch):
                adversarial = attack(answers, images[few], labels[few], generator=derived_generator(seed, number))
                with torch.no_grad():
                    right[few] = answers(adversarial).argmax(-1) == labels[few]
            kept.append(int(right.sum()))
        return kept


def run_set(study: Study, deltas: dict[str, Perturbation], settings: argparse.Namespace, white_box: bool) -> list[Any]:
    """All rows of one data set."""
    seed = settings.seed
    clean_seen = study.look(study.images)
    clean = study.suspicion(clean_seen)
    rows = [study.row("clean", "", clean_seen, {})]
    for name, delta in deltas.items():
        rows.append(study.row("T1", name, study.look(delta(study.images)), clean))
    for epsilon in EPSILONS if settings.images else ():
        for name, attack in transfer_attacks(epsilon / 255).items():
            seen = study.look(study.attacked(attack, seed))
            rows.append(study.row("T1i", name, seen, clean, epsilon=epsilon))
    for name in CORRUPTIONS if settings.corruptions else ():
        changed = corrupt(study.images.cpu(), name, 2, seeded_generator(seed)).to(study.device)
        rows.append(study.row("corruption", name, study.look(changed), {}))
    if white_box:
        rows += white_box_rows(study, settings)
    return rows


def white_box_rows(study: Study, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """T2 of the robust branch and of each cap that was asked for."""
    attacks, n = strong_attacks(WHITE_BOX, settings.quick), min(settings.white_box_n, len(study.labels))
    gate = next(iter(study.gates.values()))

    def defended(cap: float, images: Tensor) -> Tensor:
        a, b = study.benign.encoder(images), study.robust.encoder(images)
        seen = Seen(a, b, study.benign.logits(a), study.robust.logits(b))
        return study.fused(seen, gate, gate(a, [b]), cap).clamp_min(1e-12).log()

    rows = []
    with frozen(nn.ModuleList([study.benign, study.robust, gate])):
        for cap in settings.white_box_caps:
            answers = partial(_answers, study.robust) if cap == 0 else partial(defended, cap)
            kept = study.white_box(answers, attacks, n, settings.seed)
            log.info("white box, cap %.2f: %s of %d right", cap, kept, n)
            rows.append({"threat": "T2", "cap": cap, "n": n, "right": kept, "epsilon": round(255 * WHITE_BOX)})
    return rows


def craft(encoder: nn.Module, surrogate: Tensor, folder: Path, seed: int, longer: int) -> dict[str, Perturbation]:
    """Universal perturbations of the public encoder, each with ``longer`` times its steps; those there are read."""
    found = {}
    for name in (*UNIVERSAL, *PATCHES):
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            started = time.perf_counter()
            kind = UNIVERSAL_ATTACKS.get(name)
            attack = kind(image_size=surrogate.shape[-1])
            attack = replace(attack, steps=longer * attack.steps)
            attack = attack if name in PATCHES else replace(attack, epsilon=UNIVERSAL_EPSILON)
            attack.fit(encoder, surrogate, generator=seeded_generator(seed)).save(path)
            log.info("%s in %.0f s", name, time.perf_counter() - started)
        found[name] = Perturbation.load(path)
    return found


def _answers(branch: Branch, images: Tensor) -> Tensor:
    return branch.logits(branch.encoder(images))


def _share(found: Tensor) -> float:
    return round(float(found.float().mean()), 4)


def _auroc(clean: Tensor, attacked: Tensor) -> float:
    labels = [0] * len(clean) + [1] * len(attacked)
    return round(float(roc_auc_score(labels, torch.cat([clean, attacked]).cpu().numpy())), 4)


def load_set(root: Path, name: str, n: int, size: Any) -> LabelledImages:
    """The first n test images of a fixed order."""
    source, split = SETS[name]
    path = source if source == "embedded" else str(root / source)
    return load_data(path, split, image_size=size).sample(n, seed=0)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a defended model with a gate")
    parser.add_argument("--gates", nargs="*", type=Path, default=[], help="folders of the same model with other gates")
    parser.add_argument("--clip", default="open_clip:embedded", help="public encoder, for --craft")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the parquet sets")
    parser.add_argument("--out", type=Path, default=Path("results/gate.json"))
    parser.add_argument("--work", type=Path, default=Path("outputs/gate_study"), help="finished sets, perturbations")
    parser.add_argument("--craft", action="store_true", help="craft the perturbations and end")
    parser.add_argument("--longer", type=int, default=4, help="times the steps of each universal attack")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=tuple(SETS))
    parser.add_argument("--n", type=int, default=400, help="images of a set")
    parser.add_argument("--no-images", dest="images", action="store_false", help="without T1i")
    parser.add_argument("--no-corruptions", dest="corruptions", action="store_false")
    parser.add_argument("--white-box-sets", nargs="*", choices=tuple(SETS), default=WHITE_BOX_SETS)
    parser.add_argument("--white-box-n", type=int, default=400)
    parser.add_argument("--white-box-caps", nargs="+", type=float, default=[0.0, 0.45, 1.0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps of T2")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    folder = options.work / "perturbations"
    folder.mkdir(exist_ok=True)
    if options.craft:
        encoder = load_encoder(options.clip).to(options.device)
        surrogate = load_data("embedded", "surrogate", image_size=encoder.preprocess).images.to(options.device)
        craft(encoder, surrogate, folder, options.seed, options.longer)
        return
    started = time.perf_counter()
    model = ZePAD.from_pretrained(options.model).to(options.device)
    gates = {"0": _gate(model)}
    gates |= {str(number): _gate(ZePAD.from_pretrained(path).to(options.device))
              for number, path in enumerate(options.gates, start=1)}  # fmt: skip
    size = model.branch(model.config.branches[0].name).encoder.preprocess
    surrogate = load_data("embedded", "surrogate", image_size=size).images.to(options.device)
    deltas = craft(model.undefended.encoder, surrogate, folder, options.seed, options.longer)
    identity = {key: str(value) for key, value in vars(options).items() if key not in ("out", "work", "sets", "device")}
    found: dict[str, Any] = {}
    for name in options.sets:
        path = options.work / f"{name}.json"
        if path.is_file():
            kept = read_json(path)
            check_identity(kept["identity"], identity, path)
        else:
            study = Study(model, gates, load_set(options.data_root, name, options.n, size), options.batch_size)
            rows = run_set(study, deltas, options, name in options.white_box_sets)
            kept = {"identity": identity, "n": len(study.labels), "rows": rows}
            write_json(path, kept)
        log.info("%s finished after %.0f s", name, time.perf_counter() - started)
        found[name] = {"n": kept["n"], "rows": kept["rows"]}
    configs = {name: gate.config.to_dict() for name, gate in gates.items()}
    meta = provenance(seed=options.seed, config={"study": identity, "gates": configs})
    write_json(options.out, {"meta": meta, "caps": CAPS, "sets": found})


def _gate(model: ZePAD) -> FeatureGate:
    gate = model.gate
    if not isinstance(gate, FeatureGate):
        raise SystemExit("the model has no gate; train one with recipes/train_gate.py")
    return gate


if __name__ == "__main__":
    main()
