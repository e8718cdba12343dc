#!/usr/bin/env python
"""Tune, assemble and choose the shipped defended model from what ships with the package.

    python scripts/build_embedded_zepad.py                     # tunes what outputs/embedded does not hold yet
    python scripts/build_embedded_zepad.py --out my-model      # elsewhere; the shipped model stays

Three recipes with committed configs (about 70 minutes on two cores; each resumes where it was killed), then the fusion
rule, its constants and the detector's threshold from validation pictures. No test picture is touched.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from zepad_mm.attacks import FeatureUAP
from zepad_mm.branch import Branch, BranchConfig
from zepad_mm.data import load_data
from zepad_mm.encoders import has_lora, load_clip
from zepad_mm.files import read_json, write_json
from zepad_mm.heads import zero_shot_head
from zepad_mm.model import EMBEDDED_MODEL, ZePAD, ZePADConfig
from zepad_mm.prompts import templates_of
from zepad_mm.provenance import provenance
from zepad_mm.selection import select_detector, select_fusion
from zepad_mm.training import load_tuned

ROOT = Path(__file__).parents[1]
PUBLIC = "open_clip:embedded"
PARTS = (
    ("tecoa", "mpae", "tune_mpae.py", "tune_mpae_embedded_tecoa.yaml", "TeCoA at 4/255"),
    ("gen_af", "mpae", "tune_mpae.py", "tune_mpae_embedded_gen_af.yaml", "ZePAD objective (corrected) at 4/255"),
    ("benign", "bmp", "tune_bmp.py", "tune_bmp_embedded.yaml", "clean tuning on local pictures"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL, help="where the model is written")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "embedded", help="where the tuned parts lie")
    parser.add_argument("--epsilon", type=float, default=4 / 255, help="white-box budget that the rule must hold at")
    args = parser.parse_args()
    tune(args.work)
    model, records = assemble(args.work)
    validation, surrogate = load_data("embedded", "validation"), load_data("embedded", "surrogate")
    selection = select_fusion(model, validation, epsilon=args.epsilon)
    chosen = selection.chosen
    print(f"fusion: {chosen.rule} {chosen.params}: clean {chosen.clean:.3f}, white box {chosen.shared:.3f}")
    perturbation = FeatureUAP(epsilon=10 / 255).fit(model.undefended.encoder, surrogate.images)
    caught = select_detector(model, validation, perturbation(validation.images))
    print(f"detector: {model.config.detector}")
    model.save_pretrained(args.out)
    about = {
        "meta": provenance(seed=0, config={"epsilon": args.epsilon}),
        "parts": records,
        "selection": selection.to_dict(),
        "detector": {"caught_at_5_percent_false_positives": caught, "attack": str(FeatureUAP(epsilon=10 / 255))},
        "note": "everything here is from validation pictures",
    }
    write_json(args.out / "build.json", about)
    print(f"written to {args.out}")


def tune(work: Path) -> None:
    """Run the recipes whose result is not there yet."""
    for name, _, recipe, config, _ in PARTS:
        if (work / name / "tuned.json").is_file():
            print(f"{name}: there already")
            continue
        print(f"{name}: recipes/{recipe} --config recipes/configs/{config}", flush=True)
        command = [sys.executable, f"recipes/{recipe}", "--config", f"recipes/configs/{config}", "--out"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*command, str(work.resolve() / name)], check=True, cwd=ROOT, env=environment)


def assemble(work: Path) -> tuple[ZePAD, dict[str, dict[str, object]]]:
    """The model around the tuned encoders, with zero-shot heads, and the record of each part."""
    _, text = load_clip(PUBLIC)
    names, templates = load_data("embedded", "validation").class_names, templates_of("photo")
    branches, records = [], {}
    for name, role, _, _, objective in PARTS:
        encoder = load_tuned(work / name)
        if has_lora(encoder):
            encoder.backbone.peft_config["default"].base_model_name_or_path = PUBLIC  # type: ignore[index, union-attr]
        adaptation = "lora" if has_lora(encoder) else "full"
        config = BranchConfig(name=name, role=role, source=PUBLIC, adaptation=adaptation, objective=objective)
        branches.append(Branch(config, encoder, zero_shot_head(text, names, templates)))
        records[name] = read_json(work / name / "tuned.json")
    config = ZePADConfig(
        public_source=PUBLIC,
        branches=tuple(branch.config for branch in branches),
        class_names=names,
        prompts=templates,
        storage_dtype="float16",
    )
    return ZePAD(config, branches), records


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
