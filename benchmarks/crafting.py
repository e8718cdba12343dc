#!/usr/bin/env python
"""Speed of crafting universal perturbations, compared with a straightforward implementation of the same attacks.

    python -m benchmarks.crafting                     # results/bench_crafting.json, some minutes
    python -m benchmarks.crafting --small             # seconds, to check that it runs

The same attacks, images and steps on the embedded encoder, twice:

- straightforward: the encoder as loaded, with parameter gradients, and clean features recomputed at every step;
- ours: ``optimize_for_inference(encoder)``, parameters frozen while crafting, each clean image encoded once per run.

Both alternate in one process; ratios are medians over the rounds. The final losses of both are in the record, to check
that the perturbations are equally strong.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from zepad_mm.attacks import UNIVERSAL_ATTACKS
from zepad_mm.attacks.universal import base
from zepad_mm.attacks.universal.base import Surrogate
from zepad_mm.data import load_data
from zepad_mm.encoders import Encoder, load_encoder, optimize_for_inference
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
ATTACKS = ("adv_encoder", "feature_uap", "etu", "x_transfer", "l4a_base")  # the last is PAP


@contextmanager
def straightforward() -> Iterator[None]:
    """Context in which parameters are not frozen and clean images are encoded at every step."""

    def recompute(self: Surrogate, which: int, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return self.encoders[which](self.select(batch))

    with patch.object(base, "frozen", nullcontext), patch.object(Surrogate, "clean_features", recompute):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="open_clip:embedded")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--n", type=int, default=128, help="surrogate images")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="one round of two steps")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench_crafting.json")
    args = parser.parse_args()
    if args.small:
        args.steps, args.rounds, args.n = 2, 1, 16
    encoder = load_encoder(args.source).to(args.device).eval()
    size = encoder.preprocess.image_size
    images = load_data("embedded", "surrogate", size, args.n).images.to(args.device)
    plain, light = encoder.requires_grad_(True), optimize_for_inference(encoder, size)
    rows = measure(args, plain, light, images)
    config = {key: value for key, value in vars(args).items() if key != "out"}
    about = {**provenance(seed=0, config=config), "torch_threads": torch.get_num_threads()}
    write_json(args.out, {"meta": about, "rows": rows})


def measure(args: argparse.Namespace, plain: Encoder, light: Encoder, images: Tensor) -> list[dict[str, Any]]:
    """One row per attack: images per second of both implementations, the ratio and the final losses."""
    times: dict[str, dict[str, list[float]]] = {name: {"straightforward": [], "ours": []} for name in ATTACKS}
    losses: dict[str, dict[str, float]] = {name: {} for name in ATTACKS}
    for number in range(args.rounds + 1):
        for name, seconds in times.items():
            attack = UNIVERSAL_ATTACKS.get(name)(image_size=images.shape[-1], steps=args.steps, batch_size=args.batch)
            for way in seconds:
                began = time.perf_counter()
                if way == "ours":
                    perturbation = attack.fit(light, images)
                else:
                    with straightforward():
                        perturbation = attack.fit(plain, images)
                if args.device.startswith("cuda"):
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    seconds[way].append(time.perf_counter() - began)
                losses[name][way] = perturbation.provenance["final_loss"]
    crafted = args.steps * args.batch
    rows = []
    for name, seconds in times.items():
        ratios = [slow / quick for slow, quick in zip(seconds["straightforward"], seconds["ours"], strict=True)]
        speed = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        rows.append(
            {
                "attack": name,
                "images_per_second": {way: round(crafted / statistics.median(seconds[way]), 1) for way in seconds},
                "speed": {key: round(value, 3) for key, value in speed.items()},
                "final_loss": losses[name],
            }
        )
        print(rows[-1])
    return rows


if __name__ == "__main__":
    main()
