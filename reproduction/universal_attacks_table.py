#!/usr/bin/env python
"""Craft every registered universal attack on the undefended embedded CLIP, and score that CLIP and the shipped defence.

    python -m reproduction.universal_attacks_table --out results

Writes dae_attacks.json and dae_attacks.md. Perturbations are kept in --work; a second start crafts only what is
missing. An attacker has the surrogate pictures without their labels; scores are of test pictures, which nothing was
chosen on. Each attack has its defaults, which were chosen on validation pictures of this very encoder.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from zepad_mm import ZePAD
from zepad_mm.attacks import UNIVERSAL_ATTACKS, Perturbation, UniversalAttack
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders import load_clip
from zepad_mm.evaluation.metrics import share
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.utils.io import write_json, write_text
from zepad_mm.utils.provenance import provenance
from zepad_mm.utils.validation import budget_text

SOURCE = "open_clip:embedded"


def parse(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the two result files")
    parser.add_argument("--work", type=Path, default=Path("outputs/dae"), help="folder of perturbations, for resuming")
    parser.add_argument("--attacks", default=",".join(UNIVERSAL_ATTACKS), help="names, by comma (default: all)")
    parser.add_argument("--epsilon", type=float, default=10 / 255, help="L-inf budget; patches keep their own area")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: each attack's)")
    parser.add_argument("--n", type=int, default=500, help="test pictures to score")
    parser.add_argument("--n-surrogate", type=int, default=1000, help="pictures to craft on")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, attacks and noise")
    return parser.parse_args(args)


def attack_of(name: str, options: argparse.Namespace) -> UniversalAttack:
    """The attack with its defaults, at the budget and number of steps asked for."""
    attack = UNIVERSAL_ATTACKS.get(name)(seed=options.seed)
    attack = attack if attack.norm == "patch" else replace(attack, epsilon=options.epsilon)
    return attack if options.steps is None else replace(attack, steps=options.steps)


def noise_of(made: Perturbation, seed: int) -> Perturbation:
    """The control: random signs at the full budget, or a patch of random pixels in the same place."""
    random = torch.rand(made.delta.shape, generator=torch.Generator().manual_seed(seed))
    delta = random if made.norm == "patch" else made.epsilon * (random - 0.5).sign()
    return Perturbation(delta, made.epsilon, made.norm, {"attack": "random", "seed": seed}, made.place)


def crafted(name: str, options: argparse.Namespace, encoder: Any, pictures: torch.Tensor) -> Perturbation:
    """The perturbation from --work where the same attack on as many pictures made one, else a new one."""
    attack = attack_of(name, options)
    path = options.work / f"{name}.safetensors"
    if path.is_file():
        found = Perturbation.load(path)
        if (found.provenance.get("attack"), found.provenance.get("images")) == (repr(attack), len(pictures)):
            return found
    made = attack.fit({SOURCE: encoder}, pictures)
    made.save(path)
    return made


def score(models: dict[str, Any], perturbation: Perturbation | None, test: LabelledImages) -> dict[str, Any]:
    """Accuracy of each model on the same attacked pictures."""
    right: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    for images, labels in test.batches(100):
        attacked = images if perturbation is None else perturbation(images)
        with torch.no_grad():
            for name, model in models.items():
                right[name].append(model(attacked).argmax(-1) == labels)
    found = {}
    for name, parts in right.items():
        accuracy = share(torch.cat(parts))
        low, high = accuracy.interval
        found[name] = {"accuracy": accuracy.value, "ci_low": low, "ci_high": high}
    return found


def markdown(report: dict[str, Any]) -> str:
    """The table, strongest attack first; what does not clearly beat noise says so."""

    def cell(figure: dict[str, float]) -> str:
        return f"{100 * figure['accuracy']:.1f} ({100 * figure['ci_low']:.1f}-{100 * figure['ci_high']:.1f})"

    config = report["meta"]["config"]
    lines = [
        "# Downstream-agnostic attacks on the embedded CLIP",
        "",
        f"Threat T1: each perturbation was made on the undefended public encoder alone, from {config['n_surrogate']} "
        f"unlabelled pictures; the defence was not attacked itself. Accuracy in % on {config['n']} test pictures with "
        f"95 % Wilson intervals, seed {report['meta']['seed']}. L-inf budget {255 * config['epsilon']:.3g}/255; "
        "patches cover at most their share of the area, in the centre. Noise is one random pattern of the "
        "same budget, on the undefended CLIP.",
        "",
        "| attack | budget | undefended CLIP | noise | ZePAD as shipped | crafting, s |",
        "|---|---|---|---|---|---|",
        f"| none | | {cell(report['clean']['undefended'])} | | {cell(report['clean']['zepad'])} | |",
    ]
    for row in sorted(report["rows"], key=lambda row: row["undefended"]["accuracy"]):
        budget = budget_text(row["epsilon"], row["norm"])
        weak = "" if row["undefended"]["ci_high"] < row["noise"]["undefended"]["ci_low"] else " (not clearly below)"
        lines.append(
            f"| {row['attack']} | {budget} | {cell(row['undefended'])}{weak} | {cell(row['noise']['undefended'])} "
            f"| {cell(row['zepad'])} | {row['crafting_s']:.0f} |"
        )
    about = report["meta"]
    foot = f"Commit {about['commit']}, {about['hardware']}; torch {about['versions']['torch']}."
    return "\n".join([*lines, "", f"Written by reproduction/universal_attacks_table.py. {foot}", ""])


def main(options: argparse.Namespace) -> Path:
    """Craft, score and write; returns the path of the JSON file."""
    names = options.attacks.split(",")
    for name in names:
        attack_of(name, options)  # a wrong name or budget shows before the first attack, not after the last
    encoder, text = load_clip(SOURCE)
    pictures = load_data("embedded", "surrogate", 64, options.n_surrogate, options.seed).images
    test = load_data("embedded", "test", 64, options.n, options.seed)
    head = zero_shot_head(text, test.class_names)
    defence = ZePAD.from_pretrained("embedded").eval()
    models = {"undefended": lambda images: head(encoder(images)), "zepad": defence}
    config = {"source": SOURCE, "data": "embedded", "n": len(test), "n_surrogate": len(pictures)}
    config |= {"epsilon": options.epsilon, "steps": options.steps, "attacks": names}
    report: dict[str, Any] = {"meta": provenance(seed=options.seed, config=config)}
    report |= {"clean": score(models, None, test), "rows": []}
    noises: dict[tuple[str, float, str], dict[str, Any]] = {}
    bar = tqdm(names)
    for name in bar:
        bar.set_description(name)
        attack = attack_of(name, options)
        made = crafted(name, options, encoder, pictures)
        key = (made.norm, made.epsilon, made.place)
        if key not in noises:
            noises[key] = score(models, noise_of(made, options.seed + 1), test)
        settings = {field: value for field, value in asdict(attack).items() if not isinstance(value, torch.Tensor)}
        row = {"attack": name, "epsilon": made.epsilon, "norm": made.norm, "n": len(test), "seed": options.seed}
        row |= {"crafting_s": made.provenance["wall_s"], "final_loss": made.provenance["final_loss"]}
        row |= {**score(models, made, test), "noise": noises[key], "config": settings}
        report["rows"].append(row)
        path = Path(options.out) / "dae_attacks.json"
        write_json(path, report)
        write_text(path.with_suffix(".md"), markdown(report))
    return path


if __name__ == "__main__":
    print(main(parse()))
