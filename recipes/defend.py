"""Defend one CLIP: tune robust branches, train the gate, set rule and threshold, evaluate, write the card.

All processes share the tuning; the first one selects the rule and the threshold, evaluates and writes the card. A
killed run continues where it stopped when it is started again with the same settings.

Run first: nothing. Afterwards: zepad push OUT owner/name, zepad serve OUT, or RobustZeroShotClassifier in your program.

Leaves in --out: the model (config.json, model.safetensors, README.md: its card), tuned/ (a folder for each branch),
evaluation/ (report.json, report.md, records.parquet, perturbations/, figures).

    CPU:              python recipes/defend.py --config recipes/configs/smoke/defend.yaml
    2 CPU processes:  accelerate launch --multi_gpu --num_processes 2 recipes/defend.py --config ...
    one GPU:          python recipes/defend.py --config recipes/configs/vit_b32/defend.yaml
    8 GPUs:           accelerate launch --multi_gpu --num_processes 8 recipes/defend.py --config ...
    2 nodes, on each: accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank RANK
                      --main_process_ip HOST --main_process_port 29500
                      recipes/defend.py --config ...
                      (--out on a disk that both see)

Every field is an option too (--settings.train.lr_encoder 1e-4); --print_config shows them all.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zepad_mm.defend import DefendSettings, defend, tune_branches
from zepad_mm.evaluation import evaluate
from zepad_mm.evaluation.model_card import write_card
from zepad_mm.models.card import weakness_warning
from zepad_mm.training import make_accelerator
from zepad_mm.utils.config import Config
from zepad_mm.utils.stopping import NO_EFFECT, run_program


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Configuration of recipes/defend.py."""

    out: str  # folder of the result
    source: str = "open_clip:embedded"  # the public CLIP
    robust: tuple[str, ...] = ()  # robust image encoders of the same CLIP: then nothing is tuned
    data: str = "embedded"  # "embedded", a folder of parquet files or of class folders, or a name on the Hub
    settings: DefendSettings = field(default_factory=DefendSettings)
    evaluate_on: str | None = None  # data set whose test split is used; None: data
    preset: str = "demo"  # of the evaluation; "demo": minutes on two CPU cores; "full": a GPU or a night
    threats: tuple[str, ...] = ("clean", "T1", "T1b", "T2", "T3")
    n: int | None = None  # test images; None: all
    processes: int | None = None  # how many processes are expected; another number is an error
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None  # None: as accelerate launch says


def main(recipe: Recipe) -> int:
    """Run every stage; returns the exit code, 3 where a branch keeps public weights or the defence has no effect."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    accelerator = make_accelerator(recipe.processes, recipe.mixed_precision)
    if not recipe.robust:
        tune_branches(
            recipe.source, out=recipe.out, data=recipe.data, settings=recipe.settings, accelerator=accelerator
        )
    if not accelerator.is_main_process:  # the remaining stages run on one process
        return 0
    out = Path(recipe.out)
    model = defend(recipe.source, robust=recipe.robust, data=recipe.data, out=out, settings=recipe.settings)
    report = evaluate(
        model,
        data=recipe.evaluate_on or recipe.data,
        settings=recipe.preset,
        threats=recipe.threats,
        epsilon=recipe.settings.epsilon,
        n=recipe.n,
        seed=recipe.settings.train.seed,
        out=out / "evaluation",
        resume=(out / "evaluation").exists(),
    )
    write_card(out, report)
    print((out / "evaluation" / "report.md").read_text(encoding="utf-8"))
    if weakness := weakness_warning(model.config):
        print(f"{out}: {weakness}")
    return NO_EFFECT if weakness else 0


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(Recipe.from_cli())))
