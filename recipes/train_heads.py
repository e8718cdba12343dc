"""Train one head per frozen encoder on the clean images of a task: the only training a new task needs.

Every encoder is frozen, encodes each image once, and gets its own head (the paper's MLP, or a linear one). List the
public encoder too: with such a head it is the undefended baseline.

Run first: recipes/tune.py, whose --out folders are named under encoders; source strings
such as open_clip:embedded or timm:resnet18.a1_in1k do as well, untuned.

Leaves in --out: NAME.safetensors per encoder, and heads.json with the accuracies on validation.

    CPU:              python recipes/train_heads.py --config recipes/configs/smoke/train_heads.yaml
    one GPU:          python recipes/train_heads.py --config recipes/configs/embedded/train_heads.yaml
    8 GPUs:           accelerate launch --multi_gpu --num_processes 8 recipes/train_heads.py --config ... --processes 8
                      (each encodes an eighth of the images)
    2 nodes, on each: accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank RANK
                      --main_process_ip HOST --main_process_port 29500 recipes/train_heads.py --config ...
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from zepad_mm.utils.config import Config
from zepad_mm.utils.images import Resize
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import origin


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
    data, seed, out = recipe.data, recipe.settings.seed, Path(recipe.out)
    loaded: dict[Resize, tuple[LabelledImages, LabelledImages]] = {}  # most encoders want the same images
    rows: dict[str, Any] = {}
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
        if accelerator.is_main_process:
            write_head(out / f"{name}.safetensors", head, train.class_names)
            print(f"{name}: {metrics.clean:.1%} of {metrics.n} validation images")
    if accelerator.is_main_process:
        about = {"recipe": recipe.to_dict(), **origin(), "heads": rows}
        write_json(out / "heads.json", about)
    accelerator.end_training()


if __name__ == "__main__":
    main(Recipe.from_cli())
