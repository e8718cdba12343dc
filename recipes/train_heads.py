"""Train one head per frozen encoder on the clean images of a task: the only training a new task needs.

Every encoder is frozen, encodes each image once, and gets its own head (the paper's MLP, or a linear one). List the
public encoder too: with such a head it is the undefended baseline.

Run first: recipes/tune.py, whose --out folders are named under encoders; source strings
such as open_clip:embedded or timm:resnet18.a1_in1k do as well, untuned.

Leaves in --out: NAME.safetensors per encoder, and heads.json with the accuracies on validation.

    CPU:              python recipes/train_heads.py --config recipes/configs/smoke/train_heads.yaml
    one GPU:          python recipes/train_heads.py --config recipes/configs/embedded/train_heads.yaml
    8 GPUs:           accelerate launch --multi_gpu --num_processes 8 recipes/train_heads.py --config ...
                      (each encodes an eighth of the images)
    2 nodes, on each: accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank RANK
                      --main_process_ip HOST --main_process_port 29500 recipes/train_heads.py --config ...
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import nn

from zepad_mm.data import LabelledImages, load_data
from zepad_mm.defences import Student
from zepad_mm.training import (
    HeadSettings,
    fresh_head,
    load_encoder_or_tuned,
    make_accelerator,
    train_head,
    validate,
    write_head,
)
from zepad_mm.utils.atomic import replacing_folder
from zepad_mm.utils.config import Config
from zepad_mm.utils.distributed import claim_together
from zepad_mm.utils.images import Resize
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import origin
from zepad_mm.utils.stopping import run_program


@dataclass(frozen=True, kw_only=True)
class Data(Config):
    """The task, held in memory."""

    source: str = "embedded"  # "embedded", a folder of parquet files or class folders, or a name on the Hub
    train_split: str = "train"
    validation_split: str = "validation"
    image_size: int | None = None  # side in pixels that images are stored at; None: of each encoder
    n_train: int | None = None  # None: all
    n_validation: int | None = None  # None: all


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Configuration of recipes/train_heads.py."""

    out: str  # folder of the result
    encoders: dict[str, str]  # name -> source string or folder of a tuned encoder
    head: str = "mlp"  # "mlp" or "linear"
    data: Data = field(default_factory=Data)
    settings: HeadSettings = field(default_factory=HeadSettings)
    processes: int | None = None  # how many processes are expected; another number is an error


def main(recipe: Recipe) -> None:
    """Train and write."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    accelerator = make_accelerator(recipe.processes)
    with claim_together(recipe.out, accelerator):
        _train_and_write(recipe, accelerator)
    accelerator.end_training()


def _train_and_write(recipe: Recipe, accelerator: Accelerator) -> None:
    """One head per encoder; all are written together."""
    data, seed = recipe.data, recipe.settings.seed
    loaded: dict[Resize, tuple[LabelledImages, LabelledImages]] = {}  # most encoders want the same images
    rows: dict[str, Any] = {}
    heads: dict[str, nn.Module] = {}
    for name, source in recipe.encoders.items():
        encoder = load_encoder_or_tuned(source).to(accelerator.device)
        resize = encoder.preprocess.at(data.image_size)
        if resize not in loaded:
            loaded[resize] = (
                load_data(data.source, data.train_split, resize, data.n_train, seed),
                load_data(data.source, data.validation_split, resize, data.n_validation, seed),
            )
        train, validation = loaded[resize]
        head = fresh_head(recipe.head, encoder.feature_dim, len(train.class_names), seed)
        result = train_head(encoder, head, train, recipe.settings, accelerator)
        metrics = validate(Student(encoder, head), validation, accelerator, epsilon=0.0)
        rows[name] = {
            "source": source,
            "train_accuracy": result.train_accuracy,
            "validation_accuracy": metrics.clean,
            "n_validation": metrics.n,
            "losses": list(result.losses),
        }
        heads[name] = head
        if accelerator.is_main_process:
            print(f"{name}: {metrics.clean:.1%} of {metrics.n} validation images")
    if accelerator.is_main_process:
        with replacing_folder(recipe.out) as staged:
            for name, head in heads.items():
                write_head(staged / f"{name}.safetensors", head, train.class_names)
            write_json(staged / "heads.json", {"recipe": recipe.to_dict(), **origin(), "heads": rows})


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(Recipe.from_cli())))
