"""Tuning with one process against two on the same cores, and the communication of many GPUs.

``recipes/tune.py`` on the embedded CLIP at the same global batch: one process with all threads, then two with half
of them each, in turns. The goal is a loss under 10 %. Communication is calculated, not measured: a ring all-reduce
sends 2 (n - 1) / n times the gradients from each device in each step. Writes ``results/bench_scaling.json``.

    python -m benchmarks.scaling [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from zepad_mm.encoders import add_lora, count_parameters, load_encoder
from zepad_mm.training.artifacts import TUNED_RECORD
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
CONFIG = "recipes/configs/smoke/tune.yaml"


def images_per_second(processes: int, options: argparse.Namespace, out: Path) -> float:
    """Return the median over the logged steps except the first."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    recipe = ["recipes/tune.py", "--config", CONFIG, "--out", str(out), "--processes", str(processes)]
    settings = {"steps": options.steps, "batch_size": options.batch, "log_every": 1, "validation_every": options.steps}
    recipe += [f"--settings.{key}={value}" for key, value in settings.items()]
    recipe += ["--data.n_train=64", "--data.n_validation=16", "--defence_options={attack_steps: 3}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, options.threads // processes))}
    done = subprocess.run([*launch, *recipe], cwd=ROOT, check=False, capture_output=True, env=environment)
    if not (out / TUNED_RECORD).is_file():  # the exit code also says whether weights improved
        raise RuntimeError(done.stderr.decode()[-3000:])
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median([line["images_per_s"] for line in lines if line.get("images_per_s")][1:])


def communication(source: str) -> list[dict[str, Any]]:
    """Return the bytes of fp32 gradients per step, and what each device sends."""
    rows = []
    for adaptation in ("full", "lora"):
        encoder = load_encoder(source, pretrained=False).requires_grad_(True)
        if adaptation == "lora":
            add_lora(encoder)
        size = 4 * count_parameters(encoder).trainable
        rows += [
            {
                "source": source,
                "adaptation": adaptation,
                "gpus": gpus,
                "gradient_mb": round(size / 1e6, 2),
                "sent_by_each_mb": round(2 * (gpus - 1) / gpus * size / 1e6, 2),
                # at 450 GB/s within a node (NVLink) and 50 GB/s between nodes (400 Gbit/s)
                "milliseconds": round(2 * (gpus - 1) / gpus * size / (450e9 if gpus <= 8 else 50e9) * 1e3, 3),
            }
            for gpus in (8, 64)
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2, help="in all, shared by the processes")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench_scaling.json")
    options = parser.parse_args()
    config = {key: value for key, value in vars(options).items() if key != "out"}
    about = {**provenance(seed=0, config=config), "load_before": os.getloadavg()[0], "torch": torch.__version__}
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(options.rounds):
        for processes, found in speeds.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(round(images_per_second(processes, options, Path(folder) / str(turn)), 2))
    ratios = [two / one for one, two in zip(*speeds.values(), strict=True)]
    record = {
        "meta": about,
        "images_per_second": {str(processes): found for processes, found in speeds.items()},
        "two_over_one": {
            "median": round(statistics.median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3)
        },
        "communication": communication("open_clip:ViT-B-32"),
    }  # fmt: skip
    write_json(options.out, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
