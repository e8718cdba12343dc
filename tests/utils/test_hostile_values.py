"""Values that no program writes, in every configuration and every file with JSON: a ValueError of bounded length."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import pkgutil
import random
import time
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zepad_mm
from tests.helpers.encoder_zoo import ZOO
from tests.helpers.hostile import PYTHON, samples
from tests.helpers.models import make_zepad, write_clip
from zepad_mm.attacks import Perturbation
from zepad_mm.attacks.io import load_adversarial, save_adversarial
from zepad_mm.cli.attack import AttackSettings
from zepad_mm.encoders import load_clip, load_encoder
from zepad_mm.evaluation import Report
from zepad_mm.models.zepad import ZePAD
from zepad_mm.training.artifacts import load_head, load_tuned, write_head, write_tuned
from zepad_mm.training.heads import fresh_head
from zepad_mm.utils.config import Config

Load = Callable[[], object]
SLOW = ("model", "adapter", "tuned encoder")  # to load
LONGEST = 1500  # letters of a message
SLOWEST = 20.0  # seconds of one load, on a busy machine
REQUIRED: dict[str, Any] = {
    "mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 8, "public_source": "open_clip:embedded", "name": "tecoa",
    "class_names": ("cat",), "source": "open_clip:embedded", "encoders": ("open_clip:embedded",), "kind": "mlp",
    "branches": ({"name": "a", "role": "benign", "source": "open_clip:embedded"},), "role": "benign",
    "best": None, "features": (0.0,), "resized": (0.0,), "activations": (),
    "preprocess": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "image_size": 8},
}  # fmt: skip


def config_classes() -> list[type[Config]]:
    """Every settings class of the package that can be built."""
    for module in pkgutil.walk_packages(zepad_mm.__path__, "zepad_mm."):
        if "__main__" not in module.name and "serve" not in module.name:
            importlib.import_module(module.name)
    found, waiting = [], [Config]
    while waiting:
        children = waiting.pop().__subclasses__()
        waiting += children
        found += [cls for cls in children if cls.__module__.startswith("zepad_mm") and not inspect.isabstract(cls)]
    return sorted(found, key=lambda cls: cls.__qualname__)


def attempt(load: Load, what: object) -> None:
    """Load; an error must be one that names a fault in bounded time and length."""
    started = time.monotonic()
    try:
        load()
    except (ValueError, OSError) as error:
        if isinstance(error, UnicodeError) or len(str(error)) > LONGEST:
            raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:LONGEST]}") from error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert time.monotonic() - started < SLOWEST, what


@pytest.mark.parametrize("cls", config_classes(), ids=lambda cls: cls.__name__)
def test_configs_refuse_hostile_values(cls: type[Config]) -> None:
    needed = {
        field.name: REQUIRED.get(field.name, 1)
        for field in fields(cls)
        if (field.default is MISSING and field.default_factory is MISSING)
        or (field.name == "encoders" and cls is AttackSettings)
    }
    cls.from_dict(needed)
    values = random.Random(cls.__name__)
    for field in fields(cls):
        for value in values.sample(PYTHON, 8):
            attempt(lambda field=field, value=value: cls.from_dict({**needed, field.name: value}), (field.name, value))
    for value in PYTHON:
        attempt(lambda value=value: cls.from_dict(value), value)


def test_configs_name_the_key_of_a_nested_fault() -> None:
    from zepad_mm.training import TuneSettings

    with pytest.raises(ValueError, match=r"TuneSettings.settings: TrainSettings.lr_encoder wants a finite number, got"):
        TuneSettings.from_dict({"settings": {"lr_encoder": float("nan")}})


FILES: dict[str, Callable[[Path], tuple[Path, Load]]] = {}


def file(name: str) -> Callable[[Callable[[Path], tuple[Path, Load]]], None]:
    """Register what writes a file, and says how it is read; ``FILE#KEY`` is an entry in a safetensors file."""

    def store(make: Callable[[Path], tuple[Path, Load]]) -> None:
        FILES[name] = make

    return store


def of_encoder(kind: str, file: str, folder_name: str = "clip") -> Callable[[Path], tuple[Path, Load]]:
    def make(folder: Path) -> tuple[Path, Load]:
        source = ZOO[kind](folder / folder_name).source
        load = load_clip if ("open_clip" in kind or "CLIP" in kind or "SigLIP" in kind) else load_encoder
        return folder / folder_name / file, lambda: load(source)

    return make


file("open_clip")(of_encoder("open_clip: ViT, MultiheadAttention", "open_clip_config.json"))
for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
    file(f"hf CLIP {name}")(of_encoder("hf: CLIP", name))
file("hf DINOv2")(of_encoder("hf: DINOv2", "config.json", "dinov2"))
file("timm")(of_encoder("timm: ViT", "config.json"))


@file("ssl")
def _(folder: Path) -> tuple[Path, Load]:
    source = ZOO["ssl: ViT of DINO"](folder).source.partition("?")[0]
    sidecar = folder / "checkpoint.pth.json"
    options = {"mean": [0.5] * 3, "image_size": 32, "interpolation": "bilinear", "network": "online", "heads": 2}
    sidecar.write_text(json.dumps(options))
    return sidecar, lambda: load_encoder(source)


def saved_model(folder: Path, file: str) -> tuple[Path, Load]:
    (folder / "clip").mkdir()
    make_zepad(write_clip(folder / "clip")).save_pretrained(folder / "model")
    return folder / "model" / file, lambda: ZePAD.from_pretrained(folder / "model")


file("model")(lambda folder: saved_model(folder, "config.json"))
file("adapter")(lambda folder: saved_model(folder, "branches/lora/adapter_config.json"))


@file("tuned encoder")
def _(folder: Path) -> tuple[Path, Load]:
    (folder / "clip").mkdir()
    write_tuned(folder / "tuned", load_encoder(write_clip(folder / "clip")), {"best_step": 3})
    return folder / "tuned" / "tuned.json", lambda: load_tuned(folder / "tuned")


@file("head#head")
def _(folder: Path) -> tuple[Path, Load]:
    path = folder / "head.safetensors"
    write_head(path, fresh_head("mlp", 24, 3), ("a", "b", "c"))
    return path, lambda: load_head(path)


@file("perturbation#perturbation")
def _(folder: Path) -> tuple[Path, Load]:
    path = folder / "patch.safetensors"
    Perturbation(torch.zeros(3, 8, 8), 0.1, "patch", {"seed": 1}).save(path)
    return path, lambda: Perturbation.load(path)(torch.rand(1, 3, 16, 16))


@file("adversarial images")
def _(folder: Path) -> tuple[Path, Load]:
    save_adversarial(folder / "images", torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), {"attack": "pgd"})
    return folder / "images" / "adversarial.json", lambda: load_adversarial(folder / "images")


@file("checkpoint#about")
def _(folder: Path) -> tuple[Path, Load]:
    from tests.training.test_fit import quick, run

    def resume() -> None:
        run(folder, settings=quick(epochs=1, steps=2, validation_every=2))

    resume()
    return folder / "checkpoint.safetensors", resume


@file("report")
def _(folder: Path) -> tuple[Path, Load]:
    report = Report.load("tests/evaluation/earlier_model")
    path = folder / "report.json"
    path.write_text(json.dumps(report.to_dict()))
    return path, lambda: Report.load(path)


@pytest.mark.parametrize("name", FILES)
def test_files_with_hostile_values_are_refused_or_read(name: str, tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    path, load = FILES[name](tmp_path)
    load()
    key = name.partition("#")[2]
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    if key:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as opened:
            metadata = dict(opened.metadata())
    try:
        count = 4 if name in SLOW else 12
        for place, raw, text in samples(json.loads(metadata[key] if key else path.read_text()), count, seed=13):
            if key:
                save_file(tensors, path, {**metadata, key: text})
            else:
                path.write_text(text)
            attempt(load, (name, place, raw))
    finally:
        logging.disable(logging.NOTSET)
