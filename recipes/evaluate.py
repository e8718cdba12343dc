"""Evaluate a defended model under every threat model but patches.

What it is: zepad_mm.evaluate as a recipe: undefended encoder, each branch, each fusion rule; detection; diagnostics.
Do not rely on a report that says "likely overestimated".

Run first: nothing for the shipped model; recipes/tune.py and tools/build_zepad.py for one of your own.

Leaves in --out: report.json, report.md, records.parquet (per sample), perturbations/.

    CPU:              python recipes/evaluate.py --config recipes/configs/smoke/evaluate.yaml
    2 CPU processes:  accelerate launch --multi_gpu --num_processes 2 recipes/evaluate.py --config ...
    one GPU:          python recipes/evaluate.py --config recipes/configs/embedded/evaluate_full.yaml
    8 GPUs:           accelerate launch --multi_gpu --num_processes 8 recipes/evaluate.py --config ...
    2 nodes, on each: accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank RANK
                      --main_process_ip HOST --main_process_port 29500 recipes/evaluate.py --config ...
                      (--out on a disk that both see)

Processes share the batches of attacks and answers, not the crafting of universal perturbations; the table is the same.
Every field is an option too (--n 200); --print_config shows them all.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from zepad_mm.evaluation import Report, evaluate
from zepad_mm.evaluation.settings import STANDARD_THREATS
from zepad_mm.training import make_accelerator
from zepad_mm.utils.config import Config
from zepad_mm.utils.stopping import run_program


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Configuration of recipes/evaluate.py."""

    out: str  # folder of the result
    model: str = "embedded"  # "embedded", a folder, or a name on the Hub
    data: str = "embedded"  # "embedded", a folder of parquet files or class folders, or a name on the Hub
    preset: str = "demo"  # "demo": minutes on two CPU cores; "full": wants a GPU or a night
    threats: tuple[str, ...] = STANDARD_THREATS
    epsilon: float = 4 / 255  # L-inf budget of T2 and T3, in pixels of [0, 1]
    n: int | None = None  # test images; None: the preset's
    seed: int = 0
    resume: bool = False  # continue a killed run in --out
    processes: int | None = None  # number of processes expected; another number is an error


def main(recipe: Recipe) -> Report:
    """Evaluate and write."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    accelerator = make_accelerator(recipe.processes)
    report = evaluate(
        recipe.model,
        data=recipe.data,
        settings=recipe.preset,
        threats=recipe.threats,
        epsilon=recipe.epsilon,
        n=recipe.n,
        seed=recipe.seed,
        out=recipe.out,
        resume=recipe.resume,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        print((Path(recipe.out) / "report.md").read_text(encoding="utf-8"))
    accelerator.end_training()
    return report


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(Recipe.from_cli())))
