"""Accuracy of ``--plan``: estimated and measured wall time of tuning runs on the embedded CLIP.

Estimate and run take turns in one process, so that other load on the machine affects both alike. Writes
``results/bench_plan.json``; the goal is a wall time within 25 %.

    python -m benchmarks.cost [--rounds 2] [--steps 30]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from zepad_mm.data import load_data
from zepad_mm.defences import make_defence
from zepad_mm.training import TrainSettings, build_student, estimate_cost, fit, make_accelerator
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
CASES = (("fare", "lora", 3), ("tecoa", "full", 3), ("clean", "full", 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench_plan.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    about = provenance(seed=0, config={key: value for key, value in vars(options).items() if key != "out"})
    train, validation = load_data("embedded", "train", 64, 256), load_data("embedded", "validation", 64, 64)
    settings = TrainSettings(steps=options.steps, batch_size=options.batch, validation_every=options.steps)
    accelerator = make_accelerator()
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for name, adaptation, attack_steps in CASES:
            defence = make_defence(name, {"attack_steps": attack_steps})
            estimate = estimate_cost(
                build_student("open_clip:embedded", train, adaptation),
                train,
                validation,
                defence,
                settings,
                accelerator,
            )
            student = build_student("open_clip:embedded", train, adaptation)
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                fit(student, train, validation, defence, settings, out=Path(folder) / "run", accelerator=accelerator)
                wall = time.perf_counter() - began
            row = {
                "defence": name,
                "adaptation": adaptation,
                "plan_s": round(estimate.wall_s(), 2),
                "run_s": round(wall, 2),
            }
            rows.append({**row, "ratio": round(estimate.wall_s() / wall, 3), "plan": estimate.to_dict()})
            print(rows[-1])
    within = all(0.75 <= row["ratio"] <= 1.25 for row in rows)
    write_json(options.out, {"meta": about, "within_25_percent": within, "rows": rows})


if __name__ == "__main__":
    main()
