"""Tune one encoder of ZePAD's MPAE branch: adversarially, once, for every task that comes later.

What it is: an encoder (open_clip, timm), all of it or a LoRA adapter, tuned by one defence (tecoa, fare, gen_af,
gen_af_released) under a zero-shot or a fresh head, on one labelled data set. Weights are selected on a validation
split that is not the test split.

Run first: nothing. Afterwards: this recipe again for the second MPAE encoder, recipes/tune_bmp.py for the benign
branch, recipes/train_heads.py for the heads of a task.

Leaves in --out: tuned.json (the record), encoder.safetensors or adapter/ (peft), head.safetensors if a head was
trained along, run/ (metrics.jsonl, checkpoint). Killed, it resumes where it was when started again the same way.

    CPU:              python recipes/tune.py --config recipes/configs/smoke/tune.yaml
    2 CPU processes:  accelerate launch --multi_gpu --num_processes 2 recipes/tune.py --config ... --processes 2
    one GPU:          python recipes/tune.py --config recipes/configs/vit_b32/tune_tecoa_lora.yaml
    8 GPUs:           accelerate launch --multi_gpu --num_processes 8 recipes/tune.py --config ... --processes 8
    2 nodes, on each: accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank RANK
                      --main_process_ip HOST --main_process_port 29500 recipes/tune.py --config ... --processes 16
                      (--out on a disk that both see)

ImageNet and the like: --data.storage disk (read row by row) or stream, with --settings.num_workers 8.
Before anything is spent, --plan prints FLOPs, memory and wall time from a few steps and writes nothing.
Every field is an option too (--settings.lr_encoder 1e-4); --print_config shows them all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zepad_mm.defences import make_defence
from zepad_mm.encoders import LoraSettings
from zepad_mm.training import (
    DataSettings,
    TrainSettings,
    build_student,
    fit,
    make_accelerator,
    plan,
    size_of,
    write_head,
    write_tuned,
)
from zepad_mm.utils.config import Config


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Configuration of recipes/tune.py."""

    out: str  # folder of the result
    source: str = "open_clip:embedded"  # the public encoder to start from
    adaptation: Literal["full", "lora"] = "full"
    lora: LoraSettings = field(default_factory=LoraSettings)
    head: str = "auto"  # zero_shot, mlp, linear, probe; auto: zero_shot for CLIPs, else mlp, for fare probe
    prompts: str = "photo"  # prompt set or template of the zero-shot head
    defence: str = "tecoa"
    defence_options: dict[str, Any] = field(default_factory=dict)  # fields of the defence; unknown ones are refused
    data: DataSettings = field(default_factory=DataSettings)
    settings: TrainSettings = field(default_factory=TrainSettings)
    processes: int | None = None  # how many processes are expected; another number is an error
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    tracker: Literal["none", "tensorboard", "trackio"] = "none"  # beside run/metrics.jsonl
    plan: bool = field(  # from a few steps on one device
        default=False, metadata={"flag": "print what the run would cost, and write nothing"}
    )


def main(recipe: Recipe) -> None:
    """Tune and write."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    accelerator = make_accelerator(recipe.processes, recipe.mixed_precision, recipe.tracker, recipe.out)
    defence = make_defence(recipe.defence, recipe.defence_options)
    train, validation = recipe.data.load(recipe.settings.seed)
    head = recipe.head
    if head == "auto" and not defence.trains_head and not recipe.source.startswith("open_clip:"):
        head = "probe"  # a fresh head that gets no gradient would make validation a coin toss
    student = build_student(
        recipe.source,
        train,
        recipe.adaptation,
        head,
        prompts=recipe.prompts,
        lora=recipe.lora,
        seed=recipe.settings.seed,
        cache_dir=None if recipe.plan else recipe.settings.cache_dir,
    )
    if recipe.plan:
        print(plan(student, train, validation, defence, recipe.settings, accelerator))
        accelerator.end_training()
        return
    out = Path(recipe.out)
    result = fit(student, train, validation, defence, recipe.settings, out=out / "run", accelerator=accelerator)
    if accelerator.is_main_process:
        head_trained = any(parameter.requires_grad for parameter in student.head.parameters())
        if head_trained:
            write_head(out / "head.safetensors", student.head, train.class_names)
        figures = result.validation.to_dict() if result.validation else None
        record = {
            "branch": "benign" if defence.name == "clean" else "robust",
            "recipe": recipe.to_dict(),
            "defence": {"name": defence.name, **defence.to_dict()},
            "data": {"name": train.name, "n_train": size_of(train), "n_validation": len(validation)},
            "class_names": list(train.class_names),
            "steps": result.steps,
            "best_step": result.best_step,
            "validation": figures,
            "seconds": round(result.seconds, 1),
            "processes": accelerator.num_processes,
        }
        write_tuned(out, student.encoder, record)
        print(f"{out}: step {result.best_step} of {result.steps} selected, validation {figures}")
    accelerator.end_training()


if __name__ == "__main__":
    main(Recipe.from_cli())
