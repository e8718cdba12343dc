"""Files with code in them, or damaged ones, in the place of every file that is read: nothing is executed."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.encoder_zoo import ZOO
from tests.helpers.models import make_zepad, write_clip
from tests.helpers.payloads import PAYLOADS, inflated_array, inflated_checkpoint, payload
from zepad_mm.attacks import Perturbation, load_published
from zepad_mm.attacks.io import load_adversarial, save_adversarial
from zepad_mm.classifier.images import pixels_of
from zepad_mm.data import load_data
from zepad_mm.encoders import load_clip, load_encoder
from zepad_mm.encoders.build_limits import weights_size
from zepad_mm.encoders.state_dict import read_foreign
from zepad_mm.evaluation import Report
from zepad_mm.evaluation.records import Records
from zepad_mm.models.zepad import ZePAD
from zepad_mm.training.artifacts import load_head, load_tuned, write_tuned
from zepad_mm.training.settings import TrainSettings
from zepad_mm.utils.config import Config

SLOW = ("robust", "model", "tuned", "hf", "timm", "open_clip", "ssl")  # to load: a few of the payloads
Reader = Callable[[Path, str], tuple[Path, Callable[[], object]]]
READERS: dict[str, Reader] = {}


def reader(*names: str) -> Callable[[Reader], Reader]:
    """Register what says where a file lies and how it is read, for these file names."""

    def store(make: Reader) -> Reader:
        for name in names:
            READERS[name] = make
        return make

    return store


@reader("ssl.ckpt", "ssl.pth", "ssl.safetensors")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    return folder / name, lambda: load_encoder(f"ssl:{folder / name}")


@reader("robust.pt", "robust.bin", "robust.safetensors")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    source = f"{write_clip(folder)}+{folder / name}"
    return folder / name, lambda: load_encoder(source)


@reader("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.pth")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    source = write_clip(folder)
    (folder / "open_clip_model.safetensors").unlink()
    return folder / name, lambda: load_clip(source)


@reader("hf/pytorch_model.bin", "hf/model.safetensors")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    made = ZOO["hf: ViT"](folder / "hf")
    (folder / "hf" / "model.safetensors").unlink()
    return folder / name, lambda: load_encoder(made.source)


@reader("timm/pytorch_model.bin", "timm/model.safetensors")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    made = ZOO["timm: ResNet"](folder / "timm")
    for path in (folder / "timm").glob("*model*"):
        path.unlink()
    return folder / name, lambda: load_encoder(made.source)


@reader("p.pt", "p.npy", "p.npz", "p.safetensors", "p.mat", "p.pkl")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    return folder / name, lambda: load_published(folder / name, epsilon=0.1)


@reader("perturbation.safetensors")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    return folder / name, lambda: Perturbation.load(folder / name)


@reader("head.safetensors")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    return folder / name, lambda: load_head(folder / name)


@reader("tuned/encoder.safetensors", "tuned/tuned.json")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    write_tuned(folder / "tuned", load_encoder(write_clip(folder)), {"best_step": 1})
    return folder / name, lambda: load_tuned(folder / "tuned")


@reader("model/model.safetensors", "model/branches/lora/adapter_model.safetensors", "model/config.json")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    make_zepad(write_clip(folder)).save_pretrained(folder / "model")
    return folder / name, lambda: ZePAD.from_pretrained(folder / "model")


@reader("run/checkpoint.safetensors")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    from tests.training.test_fit import quick, run

    return folder / name, lambda: run(folder / "run", settings=quick(epochs=1, steps=2, validation_every=2))


@reader("data/train.parquet", "data/train/cat/a.png", "data/train/cat/a.npy", "data/train/cat/a.jpg", "data/data.py")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    (folder / name).parent.mkdir(parents=True)
    return folder / name, lambda: load_data(str(folder / "data"), "train", 8)


@reader("images/000000.png", "images/adversarial.json")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    save_adversarial(folder / "images", torch.zeros(2, 3, 8, 8))
    return folder / name, lambda: load_adversarial(folder / "images")


@reader("image.png", "image.pkl", "image.eps", "image.npy")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    return folder / name, lambda: pixels_of(str(folder / name))


@reader("report.json")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    return folder / name, lambda: Report.load(folder)


@reader("records.parquet")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    return folder / name, lambda: Records.load(folder)


@reader("settings.yaml")
def _(folder: Path, name: str) -> tuple[Path, Callable[[], object]]:
    return folder / name, lambda: from_file(TrainSettings, folder / name)


def from_file(cls: type[Config], path: Path) -> object:
    """A configuration from a file, as recipes read it; a refused one ends the program."""
    try:
        return cls.from_cli(["--config", str(path)])
    except SystemExit as error:
        raise ValueError("refused") from error


@pytest.mark.parametrize("name", READERS)
def test_no_file_runs_code(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging.disable(logging.WARNING)
    marker = tmp_path / "executed"
    try:
        path, load = READERS[name](tmp_path, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = list(PAYLOADS)
        for kind in random.Random(name).sample(kinds, 6) if name.startswith(SLOW) else kinds:
            path.write_bytes(payload(kind, marker))
            try:
                load()
            except (ValueError, OSError):
                pass
            except Exception as error:
                raise AssertionError(f"{kind}: {type(error).__name__}: {error}") from error
            assert not any(tmp_path.glob("executed*")), kind
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("call", ["os.system", "subprocess.check_output", "builtins.exec"])
@pytest.mark.parametrize("tag", ["object/apply", "object/new", "name", "module"])
def test_no_configuration_runs_code(call: str, tag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"optimizer: !!python/{tag}:{call} ['touch {tmp_path / 'executed'}']\n")
    with pytest.raises(ValueError, match="refused"):
        from_file(TrainSettings, path)
    assert not (tmp_path / "executed").exists()


def test_inflated_files_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    readers: list[Callable[[Path], Any]] = [read_foreign, load_published, lambda path: weights_size([path])]
    for name, content in (("a.npz", inflated_array()), ("a.pt", inflated_checkpoint())):
        path = tmp_path / name
        path.write_bytes(content)
        for read in readers:
            with pytest.raises(ValueError, match=r"unpacks to \d+ MB"):
                read(path)
