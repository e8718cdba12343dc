#!/usr/bin/env python
"""The gate over ten data sets: clean accuracy, attacks made on the public encoder, detection, and the white box.

    python -m reproduction.gate_study --data-root DIR --out results/gate.json
    python -m reproduction.gate_study --data-root DIR --robust TUNED --gates one.safetensors two.safetensors

DIR holds the parquet folders of the sets. The encoders are those of the shipped model unless TUNED names another robust
one. Each image is attacked once; attacked images and the features of both encoders are kept below --work, those of the
public encoder for every robust one. They give the answers of every cap and of every gate, and a killed run continues.
--prepare makes what does not depend on the robust encoder, and ends.

- T1: universal perturbations at 10/255 and a patch, made on the public encoder from surrogate images.
- T1i: attacks on each image, made on the public encoder; the attacker does not know the defence.
- T2: PGD, longer with momentum, APGD on cross-entropy, then targeted APGD, through the whole model, each on what is
  still right.
"""

from __future__ import annotations

import argparse
import logging
import sys
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
    MomentumPGD,
    Perturbation,
    TranslationInvariant,
    frozen,
)
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.data.corruptions import CORRUPTIONS, corrupt
from zepad_mm.encoders import Encoder, TextEncoder, load_clip, optimize_for_inference
from zepad_mm.evaluation.stage_cache import StageCache
from zepad_mm.models.fusion import GATED_RULE, build
from zepad_mm.models.gate import FeatureGate, with_gate
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.training import load_gate, load_tuned
from zepad_mm.training.checkpoint import crc_of
from zepad_mm.utils.io import read_json, write_json
from zepad_mm.utils.provenance import provenance
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
WHITE_BOX = 4 / 255
CAPS = (0.0, 0.2, 0.3, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the frontier
SEVERITY = 2  # of the corruptions
ATTACK_BATCH = 50  # images of T1i that are attacked together


def transfer_attacks(epsilon: float) -> dict[str, Attack]:
    """The attacks of T1i on the margin of the public model: each to its last step, but for the first.

    One that stops as soon as the public model is wrong changes the image least, which is the hardest to see.
    """
    return {
        "pgd_stopped": PGD(epsilon=epsilon, steps=10),
        "pgd": PGD(epsilon=epsilon, steps=10, stop_when_wrong=False),
        "apgd": APGD(epsilon=epsilon, steps=20, stop_when_wrong=False),
        "mi": MomentumIterative(epsilon=epsilon, stop_when_wrong=False),
        "di": DiverseInput(epsilon=epsilon, stop_when_wrong=False),
        "ti": TranslationInvariant(epsilon=epsilon, stop_when_wrong=False),
    }


def strong_attacks(epsilon: float, steps: int, targeted_steps: int) -> tuple[Attack, ...]:
    """The attacks of T2, cheap ones first; each takes the images that the ones before left right."""
    return (
        PGD(epsilon=epsilon, steps=10),
        MomentumPGD(epsilon=epsilon, steps=steps),
        APGD(epsilon=epsilon, loss="ce", steps=steps),
        APGD(epsilon=epsilon, loss="targeted", steps=targeted_steps, targets=9),
    )


@dataclass(frozen=True)
class Pair:
    """The public encoder, the robust one, and the text tower."""

    public: Encoder
    robust: Encoder
    text: TextEncoder

    @property
    def device(self) -> torch.device:
        return next(self.public.parameters()).device


@dataclass(frozen=True)
class Features:
    """Features (n, D) of the public and the robust encoder."""

    public: Tensor
    robust: Tensor


@dataclass(frozen=True)
class Caches:
    """What is kept of the public encoder, its attacked images among it, and of the robust one."""

    public: StageCache
    robust: StageCache

    @classmethod
    def open(cls, pair: Pair, options: argparse.Namespace) -> Caches:
        """The caches below --work; those of another robust encoder are left alone."""
        about = {"n": str(options.n), "seed": str(options.seed)}
        crcs = {"public": crc_of(pair.public), "robust": crc_of(pair.robust)}
        folders = {"public": options.work / "public", "robust": options.work / f"robust-{crcs['robust']:08x}"}
        made = {name: StageCache(folder) for name, folder in folders.items()}
        for name, cache in made.items():
            cache.open({"encoder": str(crcs[name]), **about}, resume=True)
        return cls(**made)


class Study:
    """One data set: its images, what both encoders say of them, and the answers by gate and cap.

    Args:
        pair: the encoders. name: of the data set. data: its images. caches: keep features. options: of the command.
    """

    def __init__(
        self, pair: Pair, name: str, data: LabelledImages, caches: Caches, options: argparse.Namespace
    ) -> None:
        self.pair, self.name, self.caches, self.options = pair, name, caches, options
        self.images, self.labels = data.images.to(pair.device), data.labels.to(pair.device)
        self.head = zero_shot_head(pair.text, data.class_names).to(pair.device)

    def features(self, stage: str, images: Callable[[], Tensor]) -> Features:
        """Features of a stage, made once; of the robust encoder none where it is not asked for."""
        sides = {"public": self.pair.public, "robust": self.pair.robust}
        if self.options.prepare:
            del sides["robust"]
        made: Tensor | None = None
        found = {}
        for side, encoder in sides.items():
            cache, key = getattr(self.caches, side), f"{self.name} {stage}"
            kept = cache.read(key)
            if kept is None:
                made = images() if made is None else made
                with torch.no_grad():
                    parts = [encoder(part).cpu() for part in made.split(self.options.batch_size)]
                kept = {"features": torch.cat(parts)}
                cache.write(key, kept)
            found[side] = kept["features"].to(self.pair.device)
        return Features(found["public"], found.get("robust", found["public"]))

    def stages(self, deltas: dict[str, Perturbation]) -> Iterator[tuple[dict[str, Any], Features]]:
        """What is known of each stage, and its features; clean images first."""
        yield {"threat": "clean", "attack": ""}, self.features("clean", lambda: self.images)
        for name, delta in deltas.items():
            about = {"threat": "T1", "attack": name}
            yield about, self.features(f"T1 {name}", partial(delta, self.images))
        for epsilon in self.options.epsilons if self.name in self.options.transfer_sets else ():
            for name, attack in transfer_attacks(epsilon / 255).items():
                if name in self.options.transfer:
                    about = {"threat": "T1i", "attack": name, "epsilon": epsilon}
                    stage = f"T1i {name} {epsilon}"
                    yield about, self.features(stage, partial(self.attacked, stage, attack))
        for name in CORRUPTIONS if self.name in self.options.corruption_sets else ():
            about = {"threat": "corruption", "attack": name}
            yield about, self.features(f"corrupted {name}", partial(self.corrupted, name))

    def corrupted(self, name: str) -> Tensor:
        """The images under an everyday corruption."""
        generator = seeded_generator(self.options.seed)
        return corrupt(self.images.cpu(), name, SEVERITY, generator).to(self.pair.device)

    def attacked(self, stage: str, attack: Attack) -> Tensor:
        """The images under an attack on the public model, made once."""
        key, answers = f"{self.name} {stage} images", partial(self._answers, self.pair.public)
        size = ATTACK_BATCH  # not an option: random starts follow from it, and what is kept serves every run
        kept = self.caches.public.read(key)
        if kept is None:
            with frozen(nn.ModuleList([self.pair.public, self.head])):
                parts = [
                    attack(answers, images, labels, generator=derived_generator(self.options.seed, number))
                    for number, (images, labels) in enumerate(
                        zip(self.images.split(size), self.labels.split(size), strict=True)
                    )
                ]
            kept = {"images": torch.cat(parts).cpu()}
            self.caches.public.write(key, kept)
        return kept["images"].to(self.pair.device)

    @torch.no_grad()
    def rows(self, deltas: dict[str, Perturbation], gates: dict[str, FeatureGate]) -> list[dict[str, Any]]:
        """Accuracies of both encoders and, for each gate, by cap; detection against the clean images."""
        rows: list[dict[str, Any]] = []
        clean: dict[str, Tensor] = {}
        for about, seen in self.stages(deltas):
            row = about | {"undefended": self.right(seen.public), "robust": self.right(seen.robust), "gates": {}}
            for name, gate in gates.items():
                z = gate(seen.public, [seen.robust])
                clean.setdefault(name, z)
                found = {
                    "by_cap": [_share(self.fused(seen, gate, z, cap).argmax(-1) == self.labels) for cap in CAPS],
                    "flagged": _share(z > self.options.thresholds[name]),
                }
                if about["threat"] in ("T1", "T1i"):
                    found["auroc"] = _auroc(clean[name], z)
                row["gates"][name] = found
            rows.append(row)
        return rows

    def fused(self, seen: Features, gate: FeatureGate, z: Tensor, cap: float) -> Tensor:
        """Logarithms of the fused probabilities (n, C), by the rule of the model with a cap on the benign weight."""
        fuse = build(GATED_RULE, (True, False), params={"cap": cap}, gate=gate.config)
        return fuse(with_gate(torch.stack([self.head(seen.public), self.head(seen.robust)]), z)).logits

    def right(self, features: Tensor) -> float:
        """Accuracy of features (n, D) under the head."""
        return _share(self.head(features).argmax(-1) == self.labels)

    def white_box(self, gate: FeatureGate) -> list[dict[str, Any]]:
        """T2 of the robust encoder alone (cap 0) and of each cap: how many images are right after each attack."""
        options, rows = self.options, []
        attacks = strong_attacks(WHITE_BOX, options.steps, options.targeted_steps)
        n = min(options.white_box_n, len(self.labels))
        with frozen(nn.ModuleList([self.pair.public, self.pair.robust, gate, self.head])):
            for cap in options.white_box_caps:
                answers = partial(self._answers, self.pair.robust) if cap == 0 else partial(self._defended, gate, cap)
                kept = self._kept(answers, attacks, n)
                log.info("%s, white box, cap %.2f: %s right", self.name, cap, kept)
                rows.append({"threat": "T2", "cap": cap, "n": n, "right": kept})
        return rows

    def _kept(self, answers: Callable[[Tensor], Tensor], attacks: Sequence[Attack], n: int) -> list[int]:
        images, labels, size = self.images[:n], self.labels[:n], self.options.batch_size
        with torch.no_grad():
            right = torch.cat([answers(few).argmax(-1) for few in images.split(size)]) == labels
        kept = [int(right.sum())]
        for number, attack in enumerate(attacks):
            for few in right.nonzero().squeeze(1).split(size) if right.any() else ():
                generator = derived_generator(self.options.seed, number)
                adversarial = attack(answers, images[few], labels[few], generator=generator)
                with torch.no_grad():
                    right[few] = answers(adversarial).argmax(-1) == labels[few]
            kept.append(int(right.sum()))
        return kept

    def _answers(self, encoder: Encoder, images: Tensor) -> Tensor:
        answers: Tensor = self.head(encoder(images))
        return answers

    def _defended(self, gate: FeatureGate, cap: float, images: Tensor) -> Tensor:
        seen = Features(self.pair.public(images), self.pair.robust(images))
        z = gate(seen.public, [seen.robust])
        return self.fused(seen, gate, z, cap)


def craft(public: Encoder, folder: Path, options: argparse.Namespace) -> dict[str, Perturbation]:
    """Universal perturbations of the public encoder; those in the folder are read."""
    surrogate = load_data("embedded", "surrogate", image_size=public.preprocess).images
    surrogate = surrogate.to(next(public.parameters()).device)
    found = {}
    for name in options.universal:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            started = time.perf_counter()
            attack = UNIVERSAL_ATTACKS.get(name)(image_size=surrogate.shape[-1])
            attack = replace(attack, steps=options.longer * attack.steps)
            attack = attack if name in PATCHES else replace(attack, epsilon=UNIVERSAL_EPSILON)
            attack.fit(public, surrogate, generator=seeded_generator(options.seed)).save(path)
            log.info("%s in %.0f s", name, time.perf_counter() - started)
        found[name] = Perturbation.load(path)
    return found


def load_pair(options: argparse.Namespace) -> tuple[Pair, dict[str, FeatureGate], dict[str, float], float]:
    """The encoders, the gates by name, the detection threshold of each gate, and the cap that the tables use."""
    gates = {path.parent.name or path.stem: load_gate(path) for path in options.gates}
    thresholds = {
        path.parent.name or path.stem: _detection_threshold(path, gate)
        for path, gate in zip(options.gates, gates.values(), strict=True)
    }
    cap = 1.0
    if options.robust is not None:
        public, text = load_clip(options.clip)
        robust = load_tuned(options.robust)
    else:
        model = ZePAD.from_pretrained(options.model)
        names = [branch.name for branch in model.config.branches]
        public, robust = (model.branch(names[model.benign.index(role)]).encoder for role in (True, False))
        text, cap = model.text, model.config.policy_caps.get("zero_sacrifice", cap)
        if isinstance(model.gate, FeatureGate):
            gates = {"shipped": model.gate} | gates
            threshold = model.config.detector.threshold
            thresholds["shipped"] = model.gate.config.calibrated_threshold if threshold is None else threshold
    side = public.preprocess.image_size
    public, robust = (optimize_for_inference(one.eval().to(options.device), side) for one in (public, robust))
    pair = Pair(public, robust, text)
    cap = cap if options.cap is None else options.cap
    return pair, {name: gate.to(options.device) for name, gate in gates.items()}, thresholds, cap


def _detection_threshold(path: Path, gate: FeatureGate) -> float:
    """Of the record beside a gate, which knows the rate of the detector; else that of the gate's weight."""
    record = path.with_name("gate.json")
    if not record.is_file():
        return gate.config.calibrated_threshold
    return float(read_json(record)["thresholds"]["detection"])


def load_set(root: Path, name: str, n: int, size: Any) -> LabelledImages:
    """n test images, drawn by a fixed seed."""
    source, split = SETS[name]
    return load_data(source if source == "embedded" else str(root / source), split, image_size=size).sample(n, seed=0)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a defended model with one robust and one benign branch")
    parser.add_argument("--clip", default="open_clip:embedded", help="public CLIP, with --robust")
    parser.add_argument("--robust", help="folder of a tuned encoder, in the place of --model")
    parser.add_argument("--gates", nargs="*", type=Path, default=[], help="files of recipes/train_gate.py")
    parser.add_argument("--cap", type=float, help="of the tables (default: of zero_sacrifice in the model, else 1)")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the parquet sets")
    parser.add_argument("--out", type=Path, default=Path("results/gate.json"))
    parser.add_argument("--work", type=Path, default=Path("outputs/gate_study"), help="features and perturbations")
    parser.add_argument("--longer", type=int, default=4, help="times the steps of each universal attack")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=tuple(SETS))
    parser.add_argument("--n", type=int, default=400, help="images of a set")
    universal = (*UNIVERSAL, *PATCHES)
    parser.add_argument("--universal", nargs="*", choices=universal, default=universal, help="attacks of T1")
    parser.add_argument("--epsilons", nargs="*", type=int, default=[2, 4, 8], help="of 255, of T1i")
    parser.add_argument("--transfer", nargs="+", default=list(transfer_attacks(WHITE_BOX)), help="attacks of T1i")
    parser.add_argument("--transfer-sets", nargs="*", choices=tuple(SETS), default=tuple(SETS), help="of T1i")
    parser.add_argument("--prepare", action="store_true", help="make what the public encoder alone needs, and end")
    parser.add_argument("--corruption-sets", nargs="*", choices=tuple(SETS), default=tuple(SETS), help="corrupted too")
    parser.add_argument("--white-box-sets", nargs="*", choices=tuple(SETS), default=["clothing", "imagenet20"])
    parser.add_argument("--white-box-n", type=int, default=400)
    parser.add_argument("--white-box-caps", nargs="+", type=float, default=[0.0, 0.45, 1.0])
    parser.add_argument("--steps", type=int, default=100, help="of momentum PGD, and of APGD on cross-entropy, in T2")
    parser.add_argument("--targeted-steps", type=int, default=100, help="of targeted APGD for each of 9 classes, in T2")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_options()
    started = time.perf_counter()
    pair, gates, options.thresholds, cap = load_pair(options)
    if cap not in CAPS:
        raise SystemExit(f"--cap: expected one of {', '.join(map(str, CAPS))}, got {cap}")
    folder = options.work / "perturbations"
    folder.mkdir(parents=True, exist_ok=True)
    deltas = craft(pair.public, folder, options)
    caches = Caches.open(pair, options)
    found: dict[str, Any] = {}
    for name in options.sets:
        data = load_set(options.data_root, name, options.n, pair.public.preprocess)
        study = Study(pair, name, data, caches, options)
        if options.prepare:
            log.info("%s: %d stages after %.0f s", name, len(list(study.stages(deltas))), time.perf_counter() - started)
            continue
        rows = study.rows(deltas, gates)
        if gates and name in options.white_box_sets:
            rows += study.white_box(next(iter(gates.values())))
        found[name] = {"n": len(data), "classes": len(data.class_names), "rows": rows}
        log.info("%s finished after %.0f s", name, time.perf_counter() - started)
    if options.prepare:
        return
    folders = ("out", "work", "data_root", "gates")  # of this machine; gates are named below
    config = {key: str(value) for key, value in vars(options).items() if key not in folders}
    configs = {name: gate.config.to_dict() for name, gate in gates.items()}
    meta = provenance(seed=options.seed, config={"study": config, "gates": configs})
    write_json(options.out, {"meta": meta, "command": _command(), "caps": CAPS, "cap": cap, "sets": found})


def _command() -> str:
    """This run as a command, with DIR for folders of this machine."""
    shown = ["DIR" if "/" in word and not word.startswith("--") else word for word in sys.argv[1:]]
    return " ".join(["python -m reproduction.gate_study", *shown])


def _share(found: Tensor) -> float:
    return round(float(found.float().mean()), 4)


def _auroc(clean: Tensor, attacked: Tensor) -> float:
    labels = [0] * len(clean) + [1] * len(attacked)
    return round(float(roc_auc_score(labels, torch.cat([clean, attacked]).cpu().numpy())), 4)


if __name__ == "__main__":
    main()
