#!/usr/bin/env python
"""Kill a tuning run with SIGKILL at random moments, on one process and on two; resumed runs must give the same result.

    python -m benchmarks.kill_tune --kills 20 --out results/kill_tune.json

The run is that of ``recipes/configs/smoke/tune.yaml`` with more steps and checkpoints. Compared bit for bit: the tuned
weights and every logged metric except the speed. Exits with the number of runs that differed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.kill_and_resume import kill_and_resume_repeatedly
from zepad_mm.training.checkpoint import CHECKPOINT
from zepad_mm.utils.io import read_tensors, write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
TUNE = ["recipes/tune.py", "--config", "recipes/configs/smoke/tune.yaml", "--settings.log_every", "1"]
TUNE += ["--settings.checkpoint_every", "2", "--settings.validation_every", "6"]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def outcome(folder: Path) -> tuple[Any, ...]:
    """Return all that must not change: logged metrics except the speed, and every weight."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]
    weights = read_tensors(folder / "encoder.safetensors")[0]
    return metrics, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills for each number of processes")
    parser.add_argument("--steps", type=int, default=24, help="steps of the killed run")
    parser.add_argument("--processes", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--out", type=Path, default=Path("outputs/kill_tune.json"), help="file of the result")
    options = parser.parse_args()
    moments, found = random.Random(options.seed), {}
    run = [*TUNE, "--settings.steps", str(options.steps)]
    with tempfile.TemporaryDirectory() as name:
        for count in options.processes:
            words = [sys.executable, *(TWO if count == 2 else []), *run, "--processes", str(count)]
            title = f"{count} process(es)"
            folder = Path(name) / str(count)
            found[title] = kill_and_resume_repeatedly(
                words, folder, options.kills, moments, outcome, title, f"run/{CHECKPOINT}"
            )
    config = {"kills": options.kills, "command": " ".join(run)}
    write_json(options.out, {"meta": provenance(seed=options.seed, config=config), **found})
    print(found)
    sys.exit(sum(result["different"] for result in found.values()))


if __name__ == "__main__":
    main()
