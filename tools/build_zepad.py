#!/usr/bin/env python
"""Build the shipped defended model: the embedded CLIP, a robust branch of it, and the feature gate between them.

    python -m tools.build_zepad --robust TUNED --gate GATE --images images.parquet
    python -m tools.build_zepad --robust shipped --gate GATE --images images.parquet      # another gate alone
    python -m tools.build_zepad --out my-model      # tunes branch and gate first; the shipped model is kept

TUNED is a tuned encoder of tools/robust_branch.py, GATE a file of recipes/train_gate.py, images.parquet what the branch
was tuned on, by tools/pack_images.py. What is not given is made from the clothes: the branch by recipes/tune.py with a
committed configuration (an hour on two cores, resumable), the gate in minutes. FARE keeps features where they were and
the gate reads features alone, so neither knows class names. The caps of both policies and the detector's threshold are
selected on the validation images. Test images are not used.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recipes import tune as tune_recipe
from tools.pack_images import unpack
from zepad_mm.attacks import FeatureUAP
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders import Encoder, load_clip
from zepad_mm.encoders.prompts import templates_of
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.detection import GATE_SCORE
from zepad_mm.models.gate import FeatureGate
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import EMBEDDED_MODEL, ZePAD, ZePADConfig
from zepad_mm.selection import select_detector, select_fusion, select_policies
from zepad_mm.training import load_gate, load_tuned, train_gate
from zepad_mm.utils.io import read_json, write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "configs" / "embedded" / "tune_fare.yaml"
PUBLIC = "open_clip:embedded"
PUBLIC_BRANCH = BranchConfig(name="benign", role="benign", source=PUBLIC, objective="none: the public encoder")
EPSILON = 1 / 255  # of the white-box attack of the selection: at 4 / 255 among all names every cap leaves nothing
OTHERS = 800  # images of each set that no branch was tuned on
UNIVERSAL = FeatureUAP(epsilon=10 / 255)  # the attack that suspicion scores are compared on


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--robust", type=Path, help="tuned folder, or shipped: the branch that is there (default: tune one)"
    )
    parser.add_argument("--gate", type=Path, help="file of the gate (default: train one)")
    parser.add_argument(
        "--images", type=Path, help="packed images, whose validation part selects; default: the clothes"
    )
    parser.add_argument("--n", type=int, default=400, help="validation images, at most")
    parser.add_argument(
        "--others", nargs="*", default=[], help="SOURCE:SPLIT of sets that no branch was tuned on, for the cap"
    )
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL, help="folder of the model (default: the shipped)")
    parser.add_argument("--work", type=Path, default=Path("outputs/embedded"), help="folder of what is made first")
    return parser.parse_args()


def main() -> None:
    args = parse_options()
    public, text = load_clip(PUBLIC)
    pool, sets = load_validation(args, public)
    validation = pool.sample(args.n, seed=0)
    for other in args.others:
        source, _, split = other.rpartition(":")
        sets.append(load_data(source, split, public.preprocess, OTHERS, seed=0))
    robust, robust_record = load_robust(args)
    gate, gate_record = load_or_train_gate(args, public, robust)
    names, prompts = validation.class_names, templates_of("photo")
    robust_branch = BranchConfig(
        name="fare", role="robust", source=PUBLIC, adaptation="full", objective=_objective(robust_record)
    )
    branches = [
        Branch(config, encoder, zero_shot_head(text, names, prompts))
        for config, encoder in ((robust_branch, robust), (PUBLIC_BRANCH, public))
    ]
    config = ZePADConfig(
        public_source=PUBLIC,
        branches=(robust_branch, PUBLIC_BRANCH),
        class_names=names,
        prompts=prompts,
        storage_dtype="float16",
        gate=gate.config,
    )
    model = ZePAD(config, branches, gate)
    selection = select_fusion(model, validation, epsilon=EPSILON)
    print(f"caps: {select_policies(model, selection, sets)}")
    perturbation = UNIVERSAL.fit(public, load_data("embedded", "surrogate", public.preprocess).images)
    detected = select_detector(model, validation, perturbation(validation.images))
    if model.config.detector.score == GATE_SCORE and "thresholds" in gate_record:  # of more images, and more sets
        model.set_detector(replace(model.config.detector, threshold=gate_record["thresholds"]["detection"]))
    print(f"detector: {model.config.detector}")
    model.set_classes(load_data("embedded", "validation", n=1).class_names)
    model.save_pretrained(args.out)
    about = {"epsilon": EPSILON, "validation": validation.name, "n": len(validation), "names": len(names)}
    record = {
        "meta": provenance(seed=0, config=about),
        "parts": {"fare": robust_record, "gate": gate_record},
        "selection": selection.to_dict(),
        "detector": {"caught_at_5_percent_false_positives": detected, "attack": str(UNIVERSAL)},
        "note": "everything here is from validation images",
    }
    write_json(args.out / "build.json", record)
    print(f"written to {args.out}")


def load_validation(args: argparse.Namespace, public: Encoder) -> tuple[LabelledImages, list[LabelledImages]]:
    """The packed validation images, in all and by source under their own names; or those of the clothes alone."""
    if args.images is None:
        return load_data("embedded", "validation", public.preprocess), []
    packed = unpack(args.images, "validation", public.preprocess.image_size)
    pool = LabelledImages(packed.pixels.float() / 255, packed.labels, packed.class_names, "packed images")
    parts = {name: packed.of(name) for name in packed.sources}
    return pool, [
        pool,
        *(
            LabelledImages(part.pixels.float() / 255, part.labels, part.class_names, name)
            for name, part in parts.items()
        ),
    ]


def load_robust(args: argparse.Namespace) -> tuple[Encoder, dict[str, Any]]:
    """The robust encoder and its record; tuned here unless one is given. A killed tuning resumes."""
    if args.robust == Path("shipped"):
        record = read_json(EMBEDDED_MODEL / "build.json")["parts"]["fare"]
        return ZePAD.from_pretrained("embedded").branch("fare").encoder, record
    folder = args.robust or args.work / "fare"
    if args.robust is None:
        options = ["--config", str(CONFIG), "--out", str(folder)]
        print(f"fare: {' '.join(options)}", flush=True)
        tune_recipe.main(tune_recipe.Recipe.from_cli(options))
    record = read_json(folder / "tuned.json")
    source = record["source"]  # may name a folder of this machine
    return load_tuned(folder), json.loads(json.dumps(record).replace(json.dumps(source), json.dumps(PUBLIC)))


def load_or_train_gate(
    args: argparse.Namespace, public: Encoder, robust: Encoder
) -> tuple[FeatureGate, dict[str, Any]]:
    """The gate and its record; trained here unless a file is given."""
    if args.gate is not None:
        record = args.gate.with_name("gate.json")
        return load_gate(args.gate), read_json(record) if record.is_file() else {}
    images = load_data("embedded", "train", public.preprocess)
    return train_gate(public, [robust], images, out=args.work / "gate", progress=True)


def _objective(record: dict[str, Any]) -> str:
    """The defence with its budget, in words."""
    options = record["identity"].get("defence")
    if options is None:
        return "FARE"
    rho = f", clean features within rho = {options['rho']}" if options.get("rho") else ""
    universal = ", universal perturbations in the batch" if options.get("universal_share") else ""
    return f"FARE at {255 * options['epsilon']:.3g}/255{rho}{universal}"


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
