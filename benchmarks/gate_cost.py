#!/usr/bin/env python
"""Time of the shipped model, compared with one undefended encoder, and of the gate alone.

    python -m benchmarks.gate_cost             # results/gate_cost.json
    python -m benchmarks.gate_cost --small     # seconds, to check that it runs

The variants are timed in turn, round after round in one process; ratios are medians over the rounds.

- undefended: the public encoder and its head;
- defended: the whole model, with its decision;
- gate: the gate alone, on features that are ready;
- gradient, gradient_optimized: the image gradient of the whole model, as it comes and as an optimised copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from zepad_mm import ZePAD
from zepad_mm.attacks import frozen
from zepad_mm.encoders import optimize_for_inference
from zepad_mm.models.gate import FeatureGate
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance

OUT = Path(__file__).parents[1] / "results" / "gate_cost.json"


def main() -> None:
    """Time the variants and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a defended model with a gate")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="two rounds, a batch of 4")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    batch, rounds = (4, 2) if options.small else (options.batch, options.rounds)
    model = ZePAD.from_pretrained(options.model).eval()
    calls = timed_calls(model, batch)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    ratios = {
        "defended / undefended": ratio(seconds, "defended", "undefended"),
        "gate / defended": ratio(seconds, "gate", "defended"),
        "gradient / gradient of an optimised copy": ratio(seconds, "gradient", "gradient_optimized"),
    }
    config = {"model": options.model, "batch": batch, "rounds": rounds}
    write_json(options.out, {
        "meta": provenance(seed=0, config=config), "ratios": ratios,
        "seconds": {name: round(statistics.median(found), 5) for name, found in seconds.items()},
    })  # fmt: skip
    print(ratios)


def timed_calls(model: ZePAD, batch: int) -> dict[str, Callable[[], object]]:
    """The variants by name, on the same random images."""
    if not isinstance(model.gate, FeatureGate):
        raise SystemExit("--model: expected a model with a gate; train one by recipes/train_gate.py")
    benign = model.undefended
    side = benign.encoder.preprocess.image_size
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    gate, width = model.gate, model.gate.benign_width
    features = torch.randn(batch, width), [torch.randn(batch, width) for _ in model.gate.robust_widths]
    optimised = optimize_for_inference(model, side)

    def gradient(one: nn.Module) -> Tensor:
        moving = images.clone().requires_grad_(True)
        with frozen(one):
            return torch.autograd.grad(one(moving).sum(), moving)[0]

    calls: dict[str, Callable[[], object]] = {
        "undefended": lambda: benign.head(benign.encoder(images)),
        "defended": lambda: model.decide(images),
        "gate": lambda: gate(*features),
    }
    without = {name: torch.no_grad()(call) for name, call in calls.items()}
    return without | {"gradient": lambda: gradient(model), "gradient_optimized": lambda: gradient(optimised)}


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    """The median over the rounds of the ratio of two variants of the same round."""
    return round(statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True)), 4)


if __name__ == "__main__":
    main()
