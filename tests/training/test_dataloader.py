"""Batches of each process: from memory, disk or a stream, with and without workers, from the start and resumed."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from recipes import tune
from tests.training.test_fit import QUICK, colours, quick, tiny_student
from zepad_mm.data import StreamedImages, load_data, open_images, stream_images
from zepad_mm.training import DataSettings, build_student, fit
from zepad_mm.training.checkpoint import trained_state
from zepad_mm.training.dataloader import TrainData, shares

ROOT = Path(__file__).parents[2]
N, FILES = 48, 4


@pytest.fixture(autouse=True)
def _no_sleep_on_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the five seconds that ``datasets`` sleeps when a stream of parquet files is left before its end."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The coloured images as four parquet files; the first pixel of an image is its index."""
    data, out = colours(N), tmp_path_factory.mktemp("colours")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(data.class_names))})
    pil_images = [to_pil_image(image) for image in data.images]
    for number, pil_image in enumerate(pil_images):
        pil_image.putpixel((0, 0), (number, 0, 0))
    for part in range(FILES):
        rows = slice(part * N // FILES, (part + 1) * N // FILES)
        table = {"image": pil_images[rows], "label": data.labels[rows].tolist()}
        Dataset.from_dict(table, features).to_parquet(out / f"train-{part}-of-{FILES}.parquet")
    return out


def opened(folder: Path, storage: str) -> TrainData:
    return DataSettings(
        source=str(folder), image_size=12, storage=storage, validation_split="train", shuffle_buffer=8
    ).load(0)[0]


def numbers(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def seen(data: TrainData, rank: int = 0, world: int = 1, start: int = 0, total: int = 6, **changes: Any) -> list[Any]:
    return [numbers(images) for images, _, _ in shares(data, quick(**changes), rank, world, start, total, False)]


@pytest.mark.parametrize(
    ("storage", "workers"), [("memory", 0), ("disk", 0), ("disk", 2), ("stream", 0), ("stream", 2)]
)
@pytest.mark.parametrize("world", [1, 2])
def test_shares_cover_every_image_equally(folder: Path, storage: str, workers: int, world: int) -> None:
    data = opened(folder, storage)
    read = [np.array(seen(data, rank, world, num_workers=workers)) for rank in range(world)]
    assert sorted(np.concatenate(read).ravel()) == sorted([*range(N)] * 2)
    if not workers or storage == "disk":
        assert sorted(np.concatenate([share[:3] for share in read]).ravel()) == [*range(N)]
        assert not np.array_equal(read[0][:3], read[0][3:])


@pytest.mark.parametrize("storage", ["disk", "stream"])
def test_shares_do_not_depend_on_workers_or_start(folder: Path, storage: str) -> None:
    data = opened(folder, storage)
    for workers in (0, 2):
        whole = seen(data, 1, 2, num_workers=workers)
        for start in (1, 4):
            assert seen(data, 1, 2, start, num_workers=workers) == whole[start:]
    if storage == "disk":
        assert seen(data, num_workers=2) == seen(opened(folder, "memory"))


def test_shares_keep_images_labels_and_rows_together(folder: Path) -> None:
    truth = load_data(str(folder), "train", 12)
    for storage in ("memory", "disk", "stream"):
        for images, labels, rows in shares(opened(folder, storage), quick(), 0, 1, 0, 3, False):
            assert torch.equal(images, truth.images[numbers(images)])
            assert torch.equal(labels, truth.labels[numbers(images)])
            assert storage == "stream" or rows.tolist() == numbers(images)


@pytest.mark.parametrize("storage", ["disk", "stream"])
def test_fit_resumes_to_the_same_weights(
    folder: Path, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, weights = opened(folder, storage), {}
    for name in ("whole", "killed"):
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr("zepad_mm.training.loop._Run._validate_and_save", _interrupt_at(5))
                with pytest.raises(KeyboardInterrupt):
                    fit(tiny_student(), data, None, QUICK, quick(num_workers=1), out=tmp_path / name)
        student = tiny_student()
        fit(student, data, None, QUICK, quick(num_workers=1), out=tmp_path / name)
        weights[name] = trained_state(student)
    assert all(torch.equal(weights["whole"][key], weights["killed"][key]) for key in weights["whole"])
    if storage == "disk":
        student = tiny_student()
        fit(student, opened(folder, "memory"), None, QUICK, quick(), out=tmp_path / "memory")
        assert all(torch.equal(weights["whole"][key], value) for key, value in trained_state(student).items())
    else:
        with pytest.raises(ValueError, match=r"train\.num_workers = 1, now train\.num_workers = 0"):
            fit(tiny_student(), data, None, QUICK, quick(steps=9), out=tmp_path / "whole")


def _interrupt_at(step: int) -> Any:
    from zepad_mm.training.loop import _Run

    whole = _Run._validate_and_save

    def validated(self: _Run, position: Any) -> Any:
        if position.step >= step:
            raise KeyboardInterrupt
        return whole(self, position)

    return validated


def test_shares_name_the_unreadable_image(folder: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (12, 12)).save(file, "PNG")
    rows = [{"bytes": file.getvalue(), "path": None}, {"bytes": file.getvalue()[:40], "path": None}]
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"image": rows, "label": [0, 1]}, features).cast_column("image", ImageFeature()).to_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(ValueError, match="row 1 could not be read as an image"):
        open_images(str(tmp_path), "train", 12).fetch(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"row 1 of .*train.parquet \(process 0\) could not be read as an image"):
        list(shares(stream_images(str(tmp_path), "train", 12), quick(batch_size=2), 0, 1, 0, 1, False))
    with pytest.raises(FileNotFoundError, match="has no split 'validation'"):
        stream_images(str(folder), "validation")
    with pytest.raises(ValueError, match="shuffle_buffer: expected at least 1"):
        stream_images(str(folder), "train", shuffle_buffer=0)


def test_fit_rejects_impossible_data_settings(folder: Path, tmp_path: Path) -> None:
    stream = opened(folder, "stream")
    assert isinstance(stream, StreamedImages)
    with pytest.raises(ValueError, match="a stream has no length"):
        fit(tiny_student(), stream, None, QUICK, quick(steps=None), out=tmp_path)
    with pytest.raises(ValueError, match="4 classes for a head of 3"):
        fit(tiny_student(), replace(stream, class_names=("a", "b", "c", "d")), None, QUICK, quick(), out=tmp_path)
    with pytest.raises(ValueError, match="num_workers: images in memory"):
        fit(tiny_student(), colours(), None, QUICK, quick(num_workers=1), out=tmp_path)
    with pytest.raises(ValueError, match="probe is fitted to images in memory"):
        build_student("open_clip:embedded", stream, head="probe")
    for wrong in (
        {"storage": "tape"},
        {"storage": "stream", "n_train": 5},
        {"storage": "stream", "validation_split": None},
    ):
        with pytest.raises(ValueError, match="storage: "):
            DataSettings(**wrong)


def test_recipe_reads_a_stream(tmp_path: Path) -> None:
    smoke = ["--config", str(ROOT / "recipes" / "configs" / "smoke" / "tune.yaml"), "--out", str(tmp_path)]
    stream = ["--data.storage", "stream", "--data.n_train", "null", "--settings.num_workers", "1"]
    tune.main(tune.Recipe.from_cli([*smoke, *stream, "--settings.steps", "2"]))
    assert (tmp_path / "tuned.json").is_file()
