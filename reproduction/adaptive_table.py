#!/usr/bin/env python
"""Attacks that know the fusion beside generic APGD-T on its output, on the paper's own rule (logit RFDM, k = 3).

    python -m reproduction.adaptive_table --out results

Every attack starts from all pictures that are answered right, at the same budget and steps per run; runs per attack
differ and are listed, since they are compute. Writes adaptive_on_rfdm.json and .md; resumes attack by attack.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zepad_mm import ZePAD
from zepad_mm.attacks import APGD, FUSED_LOSSES, Attack, FusedAttack
from zepad_mm.data import load_embedded
from zepad_mm.encoders import optimize_for_inference
from zepad_mm.evaluation.metrics import share
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.provenance import provenance

NAME = "adaptive_on_rfdm"
GENERIC = "apgd_targeted"


def runs(model: ZePAD, epsilon: float, steps: int) -> dict[str, tuple[Attack, Any, int]]:
    """name -> attack, what it looks at, and how many runs from a start it makes."""
    classes, branches = len(model.class_names), len(model.branches)
    found: dict[str, tuple[Attack, Any, int]] = {
        GENERIC: (APGD(epsilon=epsilon, steps=steps, loss="targeted"), model, min(9, classes - 1))
    }
    for loss in FUSED_LOSSES:
        attack = FusedAttack(fuse=model.fuse, loss=loss, epsilon=epsilon, steps=steps)
        found[loss] = (attack, model.branch_logits, len(FUSED_LOSSES.get(loss)(model.fuse, branches)))
    return found


@torch.no_grad()
def right(model: ZePAD, images: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(-1) for part in images.split(100)]) == labels


def figures(mask: Tensor) -> dict[str, float]:
    held = share(mask)
    return {"accuracy": held.value, "ci_low": held.interval[0], "ci_high": held.interval[1]}


def markdown(record: dict[str, Any]) -> str:
    """The table, strongest attack first."""
    settings = record["meta"]["config"]
    lines = [
        "# Adaptive attacks on the paper's rule",
        "",
        f"Shipped branches under logit RFDM, {settings['n']} test pictures, L-inf {settings['epsilon'] * 255:.3g}/255, "
        f"{settings['steps']} steps per run. Made by `python scripts/{NAME}.py`, commit {record['meta']['commit']}.",
        "",
        "| attack | runs | accuracy left in % | seconds |",
        "|---|---|---|---|",
        f"| none | | {_cell(record['clean'])} | |",
    ]
    for name, row in sorted(record["attacks"].items(), key=lambda item: item[1]["accuracy"]):
        title = f"{name} (generic)" if name == GENERIC else name
        lines.append(f"| {title} | {row['runs']} | {_cell(row)} | {row['seconds']} |")
    lines += [f"| all of FUSED_LOSSES, worst per picture | | {_cell(record['adaptive'])} | |"]
    bites = record["bites"]
    lines += ["", f"The attack that bites: `{bites}`, {100 * record['attacks'][bites]['accuracy']:.1f} % left."]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, float]) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['ci_low']:.1f}-{100 * row['ci_high']:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the two result files")
    parser.add_argument("--n", type=int, default=200, help="test pictures")
    parser.add_argument("--steps", type=int, default=20, help="of every run")
    parser.add_argument("--epsilon", type=float, default=4 / 255, help="L-inf budget in pixels of [0, 1]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = optimize_for_inference(ZePAD.from_pretrained("embedded").set_fusion("rfdm"))
    images, labels = load_embedded("test", n=options.n)
    config = {key: value for key, value in vars(options).items() if key != "out"}
    path = options.out / f"{NAME}.json"
    record: dict[str, Any] = {"attacks": {}}
    if path.is_file() and read_json(path)["meta"]["config"] == config:
        record = read_json(path)
    record["meta"] = provenance(seed=options.seed, config=config)
    clean = right(model, images, labels)
    record["clean"] = figures(clean)
    for name, (attack, target, count) in (bar := tqdm(runs(model, options.epsilon, options.steps).items())):
        bar.set_postfix_str(name)
        if name in record["attacks"]:
            continue
        began, generator = time.perf_counter(), torch.Generator().manual_seed(options.seed)
        parts = zip(images.split(64), labels.split(64), strict=True)
        held = clean & torch.cat([right(model, attack(target, x, y, generator=generator), y) for x, y in parts])
        seconds = round(time.perf_counter() - began, 1)
        record["attacks"][name] = {**figures(held), "runs": count, "seconds": seconds, "right": held.int().tolist()}
        write_json(path, record)
    masks = [torch.tensor(row["right"]).bool() for name, row in record["attacks"].items() if name != GENERIC]
    record["adaptive"] = figures(torch.stack(masks).all(0))
    record["bites"] = min(record["attacks"], key=lambda name: record["attacks"][name]["accuracy"])
    write_json(path, record)
    write_text(options.out / f"{NAME}.md", markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
