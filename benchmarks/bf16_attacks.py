#!/usr/bin/env python
"""Compare PGD in bf16 with PGD in fp32; both are scored in fp32.

    python -m benchmarks.bf16_attacks                 # results/bf16.json, some minutes on two CPU cores

On the robust branches of the shipped model and the embedded test images. Adversarial tuning with
``mixed_precision="bf16"`` attacks in bf16; the goal is a robust accuracy within half a point.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zepad_mm.attacks import PGD
from zepad_mm.data import load_data
from zepad_mm.encoders import optimize_for_inference
from zepad_mm.evaluation.metrics import share
from zepad_mm.models.zepad import ZePAD
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--epsilon", type=float, default=4 / 255)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bf16.json")
    args = parser.parse_args()
    model = ZePAD.from_pretrained("embedded").to(args.device)
    data = load_data("embedded", "test", 64, args.n)
    model.set_classes(data.class_names)
    robust = [branch.name for branch in model.config.branches if branch.role == "robust"]
    rows = []
    for name in robust:
        network = optimize_for_inference(model.branch(name))
        attack = PGD(epsilon=args.epsilon, steps=args.steps, loss="margin")
        right: dict[str, list[torch.Tensor]] = {kind: [] for kind in ("fp32", "bf16")}
        for images, labels in tqdm(list(data.batches(50)), name):
            x, y = images.to(args.device), labels.to(args.device)
            for kind, view in (("fp32", network), ("bf16", in_bf16(network, args.device))):
                adversarial = attack(view, x, y, generator=torch.Generator().manual_seed(0))
                with torch.no_grad():
                    right[kind].append((network(adversarial).argmax(-1) == y).cpu())
        rows.append(compared(name, {kind: torch.cat(parts) for kind, parts in right.items()}))
        print(rows[-1])
    config = {key: value for key, value in vars(args).items() if key != "out"}
    write_json(args.out, {"meta": provenance(seed=0, config=config), "rows": rows})


def in_bf16(network: torch.nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    """The network under bf16 autocast, with logits in fp32."""

    def view(images: Tensor) -> Tensor:
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            return network(images).float()

    return view


def compared(name: str, right: dict[str, Tensor]) -> dict[str, Any]:
    """Both robust accuracies with 95 % intervals, and the number of images that differ."""
    row: dict[str, Any] = {"model": name, "n": len(right["fp32"])}
    for kind, mask in right.items():
        found = share(mask)
        row[kind] = {"accuracy": found.value, "ci_low": found.interval[0], "ci_high": found.interval[1]}
    row["points_between"] = round(100 * (row["bf16"]["accuracy"] - row["fp32"]["accuracy"]), 2)
    row["pictures_that_differ"] = int((right["fp32"] != right["bf16"]).sum())
    return row


if __name__ == "__main__":
    main()
