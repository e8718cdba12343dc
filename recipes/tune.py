"""Tune one encoder of a ZePAD branch: adversarially for a robust branch, on clean images for the benign one.

An encoder of any library, all of it or a LoRA adapter, is tuned by one defence (tecoa, fare, gen_af, trades, ...) under
a zero-shot or a fresh head, on one labelled data set. Weights are selected on a validation split that is not the test
split. ``--defence clean`` tunes a benign branch: start it from other public weights than the robust ones, and select by
clean accuracy (``--settings.selection clean --settings.validation_epsilon 0 --settings.augment flip_shift``).

Run first: nothing. Afterwards: this recipe for the other branches, recipes/train_heads.py for the heads of a task.

Leaves in --out: tuned.json (the record), encoder.safetensors or adapter/ (peft), head.safetensors if a head was
trained along, run/ (metrics.jsonl, checkpoint). A killed run resumes when it is started again with the same settings.

    CPU:              python recipes/tune.py --config recipes/configs/smoke/tune.yaml
    2 CPU processes:  accelerate launch --multi_gpu --num_processes 2 recipes/tune.py --config ...
    one GPU:          python recipes/tune.py --config recipes/configs/vit_b32/tune_tecoa_lora.yaml
    8 GPUs:           accelerate launch --multi_gpu --num_processes 8 recipes/tune.py --config ...
    2 nodes, on each: accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank RANK
                      --main_process_ip HOST --main_process_port 29500 recipes/tune.py --config ...
                      (--out on a disk that both see)

Data sets that do not fit in memory: --data.storage disk (row by row) or stream, with --settings.num_workers 8.
A stream of a folder, or of parquet files on the Hub, shows every row once per epoch, whatever the sizes of the files
and the number of processes. Other files on the Hub do not tell their number of rows: a warning says where some rows are
seen more often (see zepad_mm/data/streaming.py).
--plan measures a few steps, prints FLOPs, memory and wall time of the whole run, and writes nothing.
Every field is an option too (--settings.lr_encoder 1e-4); --print_config shows them all.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Literal

from zepad_mm.defences import make_defence
from zepad_mm.encoders import load_encoder
from zepad_mm.training import DataSettings, TuneSettings, estimate_cost, make_accelerator, make_student, tune
from zepad_mm.utils.stopping import NO_EFFECT, run_program


@dataclass(frozen=True, kw_only=True)
class Recipe(TuneSettings):
    """Configuration of recipes/tune.py."""

    out: str  # folder of the result
    data: DataSettings = field(default_factory=DataSettings)
    processes: int | None = None  # how many processes are expected; another number is an error
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None  # None: what accelerate launch says, else "no"
    tracker: Literal["none", "tensorboard", "trackio"] = "none"  # beside run/metrics.jsonl
    plan: bool = field(  # from a few steps on one device
        default=False, metadata={"flag": "print what the run would cost, and write nothing"}
    )


def main(recipe: Recipe) -> int:
    """Tune and write; returns the exit code, 3 where no tuned weights were better than the public ones."""
    code = 0
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    accelerator = make_accelerator(recipe.processes, recipe.mixed_precision, recipe.tracker, recipe.out)
    train, validation = recipe.data.load(recipe.settings.seed, load_encoder(recipe.source).preprocess)
    if recipe.plan:
        student = make_student(recipe, train, keep_embeddings=False)
        defence = make_defence(recipe.defence, recipe.defence_options)
        print(estimate_cost(student, train, validation, defence, recipe.settings, accelerator))
    else:
        tuned = tune(
            recipe, train, validation, out=recipe.out, accelerator=accelerator, extra={"recipe": recipe.to_dict()}
        )
        record = tuned.record
        accelerator.print(
            f"{recipe.out}: step {record['best_step']} of {record['steps']} selected, validation {record['validation']}"
        )
        if tuned.untuned:
            accelerator.print(f"{recipe.out}: NOTHING WAS TUNED, no tuned weights were better than the public ones")
            code = NO_EFFECT
    accelerator.end_training()
    return code


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(Recipe.from_cli())))
