"""Tune the encoder of ZePAD's BMP branch: on local clean data, never on an attacked image.

What it is: plain supervised tuning of an encoder the attacker has not seen, all of it or a LoRA adapter, under a
zero-shot or a fresh head. For the branch to differ from the MPAE encoders start from other public weights than they
do. Weights are selected by clean accuracy on a validation split that is not the test split.

Run first: nothing. Afterwards: recipes/train_heads.py for the heads of a task.

Leaves in --out: tuned.json (the record), encoder.safetensors or adapter/ (peft), head.safetensors if a head was
trained along, run/ (metrics.jsonl, checkpoint). Killed, it resumes where it was when started again the same way.

    CPU:              python recipes/tune_bmp.py --config recipes/configs/smoke/tune_bmp.yaml
    2 CPU processes:  accelerate launch --multi_gpu --num_processes 2 recipes/tune_bmp.py --config ... --processes 2
    one GPU:          python recipes/tune_bmp.py --config recipes/configs/ssl_resnet/tune_clean.yaml
    8 GPUs:           accelerate launch --multi_gpu --num_processes 8 recipes/tune_bmp.py --config ... --processes 8
    2 nodes, on each: accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank RANK
                      --main_process_ip HOST --main_process_port 29500 recipes/tune_bmp.py --config ... --processes 16
                      (--out on a disk that both see)

Before anything is spent, --plan prints FLOPs, memory and wall time from a few steps and writes nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentParser

from zepad_mm.defences import Clean
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
    """Configuration of recipes/tune_bmp.py."""

    out: str  # folder of the result
    source: str = "open_clip:embedded"  # the encoder to start from
    adaptation: str = "full"  # "full" or "lora"
    lora: LoraSettings = field(default_factory=LoraSettings)
    head: str = "auto"  # zero_shot, mlp, linear; auto: zero_shot for CLIPs, else mlp
    prompts: str = "photo"  # prompt set or template of the zero-shot head
    data: DataSettings = field(default_factory=DataSettings)
    settings: TrainSettings = field(
        default_factory=lambda: TrainSettings(augment="flip_shift", selection="clean", validation_epsilon=0.0)
    )
    processes: int | None = None  # how many processes are expected; another number is an error
    mixed_precision: str = "no"  # "no", "bf16" or "fp16"
    tracker: str = "none"  # "tensorboard" or "trackio", beside run/metrics.jsonl
    plan: bool = False  # print what the run would cost, from a few steps on one device, and leave nothing on disk


def parse(args: list[str] | None = None) -> Recipe:
    """The configuration from a YAML file and options; unknown keys are refused."""
    parser = ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", action="config", help="YAML file; options after it override it")
    parser.add_class_arguments(Recipe, skip={"plan"})
    parser.add_argument("--plan", action="store_true", help="print what the run would cost, and write nothing")
    values = parser.parse_args(args).as_dict()
    values.pop("config")
    return Recipe.from_dict(values)


def main(recipe: Recipe) -> None:
    """Tune and write."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    accelerator = make_accelerator(recipe.processes, recipe.mixed_precision, recipe.tracker, recipe.out)
    seed = recipe.settings.seed
    train, validation = recipe.data.load(seed)
    student = build_student(
        recipe.source,
        train,
        recipe.adaptation,
        recipe.head,
        prompts=recipe.prompts,
        lora=recipe.lora,
        seed=seed,
        cache_dir=None if recipe.plan else recipe.settings.cache_dir,
    )
    if recipe.plan:
        print(plan(student, train, validation, Clean(), recipe.settings, accelerator))
        accelerator.end_training()
        return
    out = Path(recipe.out)
    result = fit(student, train, validation, Clean(), recipe.settings, out=out / "run", accelerator=accelerator)
    if accelerator.is_main_process:
        if any(parameter.requires_grad for parameter in student.head.parameters()):
            write_head(out / "head.safetensors", student.head, train.class_names)
        figures = result.validation.to_dict() if result.validation else None
        record = {
            "branch": "benign",
            "recipe": recipe.to_dict(),
            "defence": {"name": "clean"},
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
    main(parse())
