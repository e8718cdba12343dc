#!/usr/bin/env python
"""Build the shipped defended models: tune their branches, assemble them, select fusion rule and threshold.

    python -m tools.build_zepad                     # "embedded", from the images that ship
    python -m tools.build_zepad --model general --data DIR/tinyimagenet80
    python -m tools.build_zepad --out my-model      # elsewhere; the shipped model is kept

"embedded" is tuned with labels on ten class names of clothes and is robust on those; "general" (recipes/models/general)
is tuned by FARE on the clothes and on the data sets of --data, so that other class names keep their accuracy. Recipes
with committed configs run first (about 70 minutes on two cores; each resumes after a kill), then the fusion rule, its
constants and the detector's threshold are selected on validation images. Test images are not used.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes import tune as tune_recipe
from tools.clip_names import UNSEEN
from tools.joint_validation_pool import join
from zepad_mm.attacks import FeatureUAP
from zepad_mm.data import load_data
from zepad_mm.encoders import has_lora, load_clip
from zepad_mm.encoders.prompts import templates_of
from zepad_mm.models.branch import Adaptation, Branch, BranchConfig, Role
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import EMBEDDED_MODEL, ZePAD, ZePADConfig
from zepad_mm.selection import select_detector, select_fusion
from zepad_mm.training import load_tuned
from zepad_mm.utils.io import read_json, write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
N_VALIDATION = 400  # images that the rule and the threshold are chosen on, at most
PUBLIC = "open_clip:embedded"
PUBLIC_BRANCH = BranchConfig(name="benign", role="benign", source=PUBLIC, objective="none: the public encoder")


@dataclass(frozen=True)
class TunedBranch:
    """A tuned branch: its name (also of its folder and its config), its role and its objective."""

    name: str
    role: Role
    objective: str

    @property
    def config(self) -> Path:
        """The configuration of recipes/tune.py."""
        method = "clean" if self.role == "benign" else self.name
        return ROOT / "recipes" / "configs" / "embedded" / f"tune_{method}.yaml"


@dataclass(frozen=True)
class Build:
    """One shipped model: its tuned branches, in order; without a benign one the public encoder is the benign branch."""

    folder: Path
    tuned: tuple[TunedBranch, ...]
    joined: bool  # tuned and selected on the joined data sets, or on the clothes alone
    epsilon: float  # white-box budget of the selection
    tolerance: float = 0.0  # accuracy that the rule may lose to its best robust branch


BUILDS = {
    "embedded": Build(
        EMBEDDED_MODEL,
        (
            TunedBranch("tecoa", "robust", "TeCoA at 4/255"),
            TunedBranch("gen_af", "robust", "ZePAD objective (corrected) at 4/255"),
            TunedBranch("benign", "benign", "clean tuning on local images"),
        ),
        joined=False,
        epsilon=4 / 255,
    ),
    "general": Build(
        ROOT / "recipes" / "models" / "general",
        (
            TunedBranch("fare_labels", "robust", "FARE at 4/255 with cross-entropy beside it"),
        ),  # plain FARE beside it: weaker
        joined=True,
        epsilon=2 / 255,
        tolerance=0.06,  # clean accuracy first: at least the undefended CLIP's on validation images
    ),
}


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(BUILDS), default="embedded", help="which one")
    parser.add_argument(
        "--data", action="append", default=[], metavar="SET", help="joined to the clothes (general only)"
    )
    parser.add_argument("--out", type=Path, help="folder of the model (default: replace the shipped one)")
    parser.add_argument("--work", type=Path, default=Path("outputs/embedded"), help="folder of the tuned branches")
    options = parser.parse_args()
    if BUILDS[options.model].joined and not options.data:
        parser.error(f"{options.model} is tuned on more than the clothes; give --data, e.g. --data DIR/tinyimagenet80")
    return options


def main() -> None:
    args = parse_options()
    build = BUILDS[args.model]
    sources = ["embedded:train+surrogate", "embedded:train+surrogate", *args.data]  # the clothes are few: twice
    pool = str(join(sources, args.work / "pool", UNSEEN)) if build.joined else "embedded"
    validation = load_data(pool, "validation").sample(N_VALIDATION, seed=0)
    surrogate = load_data("embedded", "surrogate")
    tune(build, args.work, pool)
    model, records = assemble(build, args.work, validation.class_names)
    selection = select_fusion(model, validation, epsilon=build.epsilon, tolerance=build.tolerance)
    chosen = selection.chosen
    print(f"fusion: {chosen.rule} {chosen.params}: clean {chosen.clean:.3f}, white box {chosen.shared:.3f}")
    perturbation = FeatureUAP(epsilon=10 / 255).fit(model.undefended.encoder, surrogate.images)
    detected = select_detector(model, validation, perturbation(validation.images))
    print(f"detector: {model.config.detector}")
    model.set_classes(load_data("embedded", "validation", n=1).class_names)
    out = args.out or build.folder
    model.save_pretrained(out)
    sets = [Path(name).name for name in sources]
    record = {
        "meta": provenance(
            seed=0, config={"model": args.model, "epsilon": build.epsilon, "tolerance": build.tolerance, "sets": sets}
        ),
        "parts": records,
        "selection": selection.to_dict(),
        "detector": {"caught_at_5_percent_false_positives": detected, "attack": str(FeatureUAP(epsilon=10 / 255))},
        "note": "everything here is from validation images",
    }
    write_json(out / "build.json", record)
    print(f"written to {out}")


def tune(build: Build, work: Path, pool: str) -> None:
    """Run the tuning recipe for every branch; branches that exist are kept, killed runs are resumed."""
    for branch in build.tuned:
        options = ["--config", str(branch.config), "--data.source", pool, "--out", str(work / branch.name)]
        print(f"{branch.name}: {' '.join(options)}", flush=True)
        tune_recipe.main(tune_recipe.Recipe.from_cli(options))


def assemble(build: Build, work: Path, names: tuple[str, ...]) -> tuple[ZePAD, dict[str, dict[str, object]]]:
    """The model around the tuned encoders, with zero-shot heads, and the record of each part."""
    public, text = load_clip(PUBLIC)
    templates = templates_of("photo")
    branches, records = [], {}
    for tuned in build.tuned:
        encoder = load_tuned(work / tuned.name)
        if has_lora(encoder):
            encoder.backbone.peft_config["default"].base_model_name_or_path = PUBLIC  # type: ignore[index, union-attr]
        adaptation: Adaptation = "lora" if has_lora(encoder) else "full"
        config = BranchConfig(
            name=tuned.name, role=tuned.role, source=PUBLIC, adaptation=adaptation, objective=tuned.objective
        )
        branches.append(Branch(config, encoder, zero_shot_head(text, names, templates)))
        records[tuned.name] = read_json(work / tuned.name / "tuned.json")
    if all(tuned.role != "benign" for tuned in build.tuned):
        branches.append(Branch(PUBLIC_BRANCH, public, zero_shot_head(text, names, templates)))
    about = ZePADConfig(
        public_source=PUBLIC,
        branches=tuple(branch.config for branch in branches),
        class_names=names,
        prompts=templates,
        tuned_names=() if build.joined else names,
        storage_dtype="float16",
    )
    return ZePAD(about, branches), records


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
