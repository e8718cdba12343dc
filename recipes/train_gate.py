"""Train the feature gate of a defended model on unlabelled images: it detects attacks and weighs the benign branch.

The encoders of a model, or a public encoder and robust ones, are frozen. The gate learns to tell clean and corrupted
images from attacked ones by what both kinds of encoders say about one image; labels and class names are not needed.
Thresholds are set on images that the gate was not trained on: a part of each data set, and all sets of ``calibration``.

Run first: nothing for the shipped model; recipes/tune.py with FARE for encoders of your own.

Leaves in --out: gate.safetensors, gate.json (settings, false alarms by set, AUROC by kind of attack), cache/ (what a
killed run continues from; delete it afterwards).

    CPU:              python recipes/train_gate.py --config recipes/configs/smoke/train_gate.yaml
    one GPU:          python recipes/train_gate.py --config recipes/configs/embedded/train_gate.yaml
    8 GPUs, 2 nodes:  one process, which takes minutes at most; start one per model.

Every field is an option too (--settings.rounds 6); --print_config shows them all.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from zepad_mm.data import LabelledImages, StoredImages, load_data, open_images
from zepad_mm.encoders import Encoder, load_clip
from zepad_mm.encoders.clip import is_clip
from zepad_mm.models.zepad import ZePAD
from zepad_mm.training import GateSettings, load_encoder_or_tuned, make_accelerator, train_gate, write_gate
from zepad_mm.utils.atomic import replacing_folder
from zepad_mm.utils.config import Config
from zepad_mm.utils.distributed import claim_together
from zepad_mm.utils.images import Resize
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import origin
from zepad_mm.utils.stopping import run_program


@dataclass(frozen=True, kw_only=True)
class Source(Config):
    """Images of one data set; labels are not needed."""

    source: str  # "embedded", a folder of images, of parquet files or class folders, or a name on the Hub
    split: str = "train"
    n: int | None = None  # drawn by the seed; None: all
    on_disk: bool = False  # decode when needed, for sets that do not fit in memory

    def load(self, resize: Resize, seed: int) -> LabelledImages | StoredImages:
        """The images at one size."""
        if self.on_disk:
            return open_images(self.source, self.split, resize).sample(self.n, seed)
        return load_data(self.source, self.split, resize, self.n, seed, labelled=False)


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Configuration of recipes/train_gate.py."""

    out: str  # folder of the result
    model: str | None = None  # "embedded", a folder or a Hub name of a defended model; or give benign and robust
    benign: str | None = None  # source string or folder of a tuned encoder
    robust: list[str] = field(default_factory=list)  # of the robust encoders, as for benign
    data: dict[str, Source] = field(default_factory=lambda: {"clothing": Source(source="embedded")})  # by name
    calibration: dict[str, Source] = field(default_factory=dict)  # sets that set thresholds and are not trained on
    image_size: int | None = None  # side in pixels that images are stored and attacked at; None: of the encoder
    class_names: list[str] = field(default_factory=list)  # whose text embeddings some attacks use; empty: of the data
    settings: GateSettings = field(default_factory=GateSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) == (self.benign is None) or (self.benign is not None) != bool(self.robust):
            raise ValueError(
                "expected a model, or a benign encoder and robust ones: --model embedded, or "
                f"--benign open_clip:embedded --robust '[outputs/fare]'; got model={self.model!r}, "
                f"benign={self.benign!r}, robust={self.robust!r}"
            )


def main(recipe: Recipe) -> dict[str, Any]:
    """Train and write; returns the record."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with claim_together(recipe.out):
        record = _train_and_write(recipe)
    print(
        f"{recipe.out}: thresholds {record['thresholds']}, mean AUROC {record['mean_auroc']:.3f} on validation images"
    )
    return record


def _train_and_write(recipe: Recipe) -> dict[str, Any]:
    device = make_accelerator(1).device
    benign, *robust = [encoder.to(device) for encoder in load_encoders(recipe)]
    resize, seed = benign.preprocess.at(recipe.image_size), recipe.settings.seed
    images = {name: source.load(resize, seed) for name, source in recipe.data.items()}
    gate, record = train_gate(
        benign,
        robust,
        images,
        recipe.settings,
        calibration={name: source.load(resize, seed) for name, source in recipe.calibration.items()},
        directions=_text_directions(recipe, benign.source, images),
        out=recipe.out,
        progress=True,
    )
    with replacing_folder(recipe.out) as staged:
        write_gate(staged / "gate.safetensors", gate)
        write_json(staged / "gate.json", {"recipe": recipe.to_dict(), **origin(), **record})
    return record


def load_encoders(recipe: Recipe) -> list[Encoder]:
    """The benign encoder, then the robust ones."""
    if recipe.model is None:
        assert recipe.benign is not None
        return [load_encoder_or_tuned(source) for source in (recipe.benign, *recipe.robust)]
    model = ZePAD.from_pretrained(recipe.model)
    names = [branch.name for branch in model.config.branches]
    benign = [name for name, own in zip(names, model.benign, strict=True) if own]
    if not benign:
        raise ValueError(f"{recipe.model} has no benign branch; it has {', '.join(names)}")
    return [model.branch(name).encoder for name in (benign[0], *(name for name in names if name not in benign))]


def _text_directions(recipe: Recipe, source: str, images: dict[str, Any]) -> Tensor | None:
    """(K, D) embeddings of class names by the text tower of the benign CLIP; None where there is none."""
    names = recipe.class_names or sorted({name for data in images.values() for name in data.class_names})
    return load_clip(source)[1].class_embeddings(names) if names and is_clip(source) else None


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(Recipe.from_cli())))
