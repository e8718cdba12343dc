"""Splits, classes, columns and labels of data sets: by name and place, checked before anything runs."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from zepad_mm.data import EMBEDDED_DATA, SplitNotFoundError, load_class_names, load_data, open_images, stream_images
from zepad_mm.data.folders import held_out_splits, image_files
from zepad_mm.defend import DefendSettings, _load_splits
from zepad_mm.evaluation import EvalData, EvalSettings
from zepad_mm.training.settings import DataSettings
from zepad_mm.utils.images import Resize

READERS = {"in memory": load_data, "on disk": open_images, "streamed": stream_images}


def write_images(folder: Path, *names: str) -> str:
    """Small images of increasing brightness; returns the folder as a source."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("L", (8, 8), number).save(path)
    return str(folder)


def write_parquet(path: Path, labels: Sequence[Any], names: Sequence[str] = ("a", "b"), **columns: Any) -> None:
    """A table of images whose brightness is their row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [PILImage.new("L", (8, 8), row % 256) for row in range(len(labels))]
    rows: dict[str, Any] = {"image": images, "label": list(labels)}
    features: dict[str, Any] = {"image": Image(), "label": ClassLabel(names=list(names))}
    for name, feature in columns.items():
        rows[name] = images if isinstance(feature, Image) else [0] * len(labels)
        features[name] = feature
    Dataset.from_dict(rows, Features(features)).to_parquet(path)


def class_names(read: str, source: str, split: str = "train") -> tuple[str, ...]:
    return READERS[read](source, split, 8).class_names  # type: ignore[operator]


@pytest.mark.parametrize("read", list(READERS))
def test_split_folders_hold_classes_of_any_name(read: str, tmp_path: Path) -> None:
    """Words for splits in the names of classes and files, other spellings, and a class that one split lacks."""
    source = write_images(
        tmp_path / "test tube photos",
        *(f"Training/{name}/test-{i}.PNG" for name in ("beaker", "test tube", "train") for i in range(3)),
        *(f"VAL/{name}/train.png" for name in ("test tube", "train")),
        "test/train/deep/er/1.jpg",
        "test/train/._1.jpg",
        ".cache/train/1.png",
    )
    (Path(source) / "docs").mkdir()
    (Path(source) / "test" / "train" / "notes.txt").write_text("no image")
    expected = {"train": [0, 0, 0, 1, 1, 1, 2, 2, 2], "validation": [1, 2], "test": [2]}
    for split, labels in expected.items():
        data: Any = READERS[read](source, split, 8)
        assert data.class_names == ("beaker", "test tube", "train")
        if read == "streamed":
            rows = data.rows(0, 1, 0)
            assert sorted(next(rows)[1] for _ in labels) == labels
        else:
            assert data.labels.tolist() == labels


@pytest.mark.parametrize("read", list(READERS))
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/cat/1.png", "valid/cat/1.png", "val/cat/1.png"), "val and valid both name the split 'validation'"),
        (("train/1.png", "car/1.png", "bus/1.png"), r"\(train\) beside others \(bus, car\)(.|\n)*CLASS/IMAGE"),
        (("train/cat/1.png", "dog/1.png"), r"like splits \(train\) beside others \(dog\)"),
        (("cat/indoor/1.png", "dog/outdoor/1.png"), "is 'cat' a split or a class"),
        (("train/cat/1.png", "1.png"), "both images .* and folders of images"),
        (("train/cat/1.png", "train/1.png"), "both images .* and class folders"),
        (("train/Cat/1.png", "train/cat_/1.png"), "given more than once"),
        (("train/1.png", "train/2.png"), "has no labels"),
        (("train/cat/1.png", "val/images/1.png"), "val holds the folders images, and train cat: no class in common"),
        (("train_images/1.png", "test_images/1.png"), "is 'test_images' a split or a class"),
        (("Training Set/1.png", "cat/1.png"), "is 'Training Set' a split or a class"),
        (("photos/train/cat/1.png", "photos/test/cat/1.png"), "photos holds the splits: give that folder"),
    ],
)  # fmt: skip
def test_layouts_that_can_be_read_in_two_ways_are_refused(
    read: str, names: Sequence[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        class_names(read, write_images(tmp_path, *names))


def test_links_and_thumbnails_of_systems_leave_classes_as_they_are(tmp_path: Path) -> None:
    """One folder linked as two splits is both; folders that a NAS adds, and a link to the whole, are none."""
    source = write_images(tmp_path, "all/cat/1.png", "all/dog/1.png", "all/dog/@eaDir/1.png")
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "all")
    (tmp_path / "all" / "dog" / "again").symlink_to(tmp_path / "all")
    for split in ("train", "test"):
        files = image_files(Path(source) / "data", split)
        assert (files.labels, files.class_names) == ((0, 1), ("cat", "dog")), split


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train.parquet", "train-0.parquet"), "not the parts of one export"),
        (("train-0.parquet", "train-2.parquet"), "numbers without a gap"),
        (("train/0000.parquet",), "train/0000.parquet is one level down"),
        (("a/b/0.parquet",), "FOLDER/IMAGE, without classes, where no labels are needed"),
    ],
)
def test_incomplete_exports_are_refused(names: Sequence[str], message: str, tmp_path: Path) -> None:
    for name in names:
        write_parquet(tmp_path / name, [0, 1])
    for read in READERS:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            class_names(read, str(tmp_path))


def test_columns_and_splits_are_asked_for_once(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1], **{"a&b?": Image()})
    assert class_names("in memory", f"{tmp_path}?image=a%26b%3F") == ("a", "b")
    for read in READERS:
        with pytest.raises(ValueError, match="each once"):
            class_names(read, f"{tmp_path}?image=image&image=a")
        with pytest.raises(ValueError, match="each split once"):
            class_names(read, str(tmp_path), "train+training")
        with pytest.raises(FileNotFoundError, match="expected the path of a folder"):
            class_names(read, "")


def test_class_folders_without_splits_are_split_by_a_fixed_rule(tmp_path: Path) -> None:
    source = write_images(tmp_path / "one", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(20)))
    files = {split: image_files(Path(source), split) for split in ("train", "validation", "test")}
    assert {split: len(found.paths) for split, found in files.items()} == {"train": 28, "validation": 4, "test": 8}
    assert all(found.class_names == ("cat", "dog") for found in files.values())
    assert all(sum(found.labels or ()) * 2 == len(found.paths) for found in files.values())
    assert len({path for found in files.values() for path in found.paths}) == 40
    moved = write_images(tmp_path / "another", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(20)))
    names = [Path(path).relative_to(source) for path in files["test"].paths]
    assert [Path(path).relative_to(moved) for path in image_files(Path(moved), "test").paths] == names
    assert held_out_splits(tmp_path, [str(tmp_path / "1.png"), str(tmp_path / "2.png")])["test"] == []
    with pytest.raises(SplitNotFoundError, match="has no splits"):
        load_data(source, "surrogate", 8)


def shades(data: Any) -> set[int]:
    images = data if isinstance(data, torch.Tensor) else data.images
    return {round(float(image.max()) * 255) for image in images}


def test_defend_evaluate_and_training_split_alike(tmp_path: Path) -> None:
    source = write_images(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(20)))
    evaluated = EvalData.load(source, EvalSettings(threats=("clean",), image_size=8))
    train, validation = _load_splits(source, DefendSettings(), Resize(image_size=8))
    tuned, tuned_on = DataSettings(source=source, image_size=8).load(0)
    assert shades(evaluated.validation) == shades(validation) == shades(tuned_on)
    assert shades(train) == shades(tuned) == shades(evaluated.surrogate)
    assert not shades(evaluated.test) & (shades(train) | shades(validation))


def test_flat_folders_are_read_where_no_labels_are_needed(tmp_path: Path) -> None:
    source = write_images(tmp_path / "flat", *(f"{i}.png" for i in range(10)))
    assert len(load_data(source, "train", 8, labelled=False)) == 7
    source = write_images(tmp_path / "split", "train/1.png", "test/2.png")
    data = load_data(source, "train", 8, labelled=False)
    assert (data.labels.tolist(), data.class_names) == ([-1], ())


@pytest.mark.parametrize("read", list(READERS))
def test_parquet_files_are_chosen_by_the_exact_split(read: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos [2024] *?"
    write_parquet(folder / "train-00000-of-00002.parquet", [0] * 3)
    write_parquet(folder / "train-00001-of-00002.parquet", [1] * 2)
    write_parquet(folder / "training_extra.parquet", [0] * 7)
    write_parquet(folder / "val.parquet", [0])
    write_parquet(folder / "test-0.parquet", [0])
    for split, number in (("train", 5), ("validation", 1), ("train+test", 6), ("training_extra", 7)):
        data: Any = READERS[read](str(folder), split, 8)
        assert (sum(unit.size for unit in data.units) if read == "streamed" else len(data)) == number
    with pytest.raises(SplitNotFoundError, match="no split 'surrogate'; it has test, train, training_extra, val"):
        class_names(read, str(folder), "surrogate")
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="one of 2 parts of the split 'train', and 1 are there"):
        class_names(read, str(folder))


@pytest.mark.parametrize("read", list(READERS))
def test_parquet_parts_with_other_classes_are_refused(read: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1])
    write_parquet(tmp_path / "train-1.parquet", [0, 1], names=("b", "a"))
    write_parquet(tmp_path / "test.parquet", [])
    with pytest.raises(ValueError, match=r"train-1.parquet has other columns or classes than .*train-0.parquet"):
        class_names(read, str(tmp_path))
    with pytest.raises(ValueError, match="rows"):
        class_names(read, str(tmp_path), "test")


@pytest.mark.parametrize("read", list(READERS))
def test_damaged_parquet_is_no_missing_split(read: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0] * 30)
    write_parquet(tmp_path / "validation-0.parquet", [0] * 8)
    file = tmp_path / "validation-0.parquet"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"validation-0.parquet is not a complete parquet file"):
        class_names(read, str(tmp_path), "validation")
    with pytest.raises(ValueError, match="not a complete parquet file"):
        _load_splits(str(tmp_path), DefendSettings(), Resize(image_size=8))
    with pytest.raises(ValueError, match="not a complete parquet file"):
        EvalData.load(str(tmp_path), EvalSettings(threats=("clean",), test_split="train", image_size=8))


def test_evaluation_keeps_the_splits_that_are_there(tmp_path: Path) -> None:
    for split, label, rows in (("train", 0, 20), ("validation", 1, 8), ("test", 0, 4)):
        write_parquet(tmp_path / f"{split}-0.parquet", [label] * rows)
    data = EvalData.load(str(tmp_path), EvalSettings(threats=("clean",), image_size=8))
    assert (len(data.validation), data.validation.labels.unique().tolist()) == (8, [1])
    assert len(data.surrogate) == 20
    write_parquet(tmp_path / "validation-0.parquet", [0] * 8, names=("b", "a"))
    with pytest.raises(ValueError, match="classes a, b in the split 'test' and b, a in that of the validation"):
        EvalData.load(str(tmp_path), EvalSettings(threats=("clean",), image_size=8))


@pytest.mark.parametrize("read", list(READERS))
@pytest.mark.parametrize("label", [None, -1])
def test_rows_without_a_label_are_named_before_they_are_used(read: str, label: int | None, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, label, label])
    text = "no label" if label is None else "the label -1"
    with pytest.raises(ValueError, match=f"row 2 has {text}, and so have 2 of 4 rows"):
        class_names(read, str(tmp_path))


def test_all_damaged_images_are_named_at_once(tmp_path: Path) -> None:
    source = write_images(tmp_path, *(f"train/{name}/{i}.png" for name in ("a", "b") for i in range(5)))
    for name in ("a/1.png", "b/0.png"):
        (tmp_path / "train" / name).write_bytes(b"<html>404</html>")
    message = r"2 of 10 images cannot be used.*row 1 \(.*a/1.png\).*row 5 \(.*b/0.png\)"
    with pytest.raises(ValueError, match=message):
        load_data(source, "train", 8)
    with pytest.raises(ValueError, match=message):
        DataSettings(source=source, storage="disk", validation_split="train").load(0)


@pytest.mark.parametrize("read", list(READERS))
def test_columns_are_chosen_by_name_or_asked_for(read: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "named" / "train.parquet", [0, 1], mask=Image(), domain=ClassLabel(names=["x"]))
    assert class_names(read, str(tmp_path / "named")) == ("a", "b")
    assert class_names(read, f"{tmp_path / 'named'}?label=domain") == ("x",)
    table = Dataset.from_parquet(str(tmp_path / "named" / "train.parquet"))
    (tmp_path / "renamed").mkdir()
    table.rename_columns({"image": "front", "label": "fine"}).to_parquet(tmp_path / "renamed" / "train.parquet")
    (tmp_path / "numbers").mkdir()
    table.cast_column("label", Value("int64")).to_parquet(tmp_path / "numbers" / "train.parquet")
    for source, message in (
        ("renamed", r"several columns of type Image: .*front.*\?image=COLUMN"),
        ("renamed?image=front", r"several columns of type ClassLabel: .*fine.*\?label=COLUMN"),
        ("named?label=mask", "the column 'mask' is Image"),
        ("named?label=shape", "the column 'shape' is missing"),
        ("named?colour=red", r"expected NAME\?image=COLUMN&label=COLUMN"),
        ("numbers", "the column 'label' is Value.*expected one of type ClassLabel"),
    ):
        with pytest.raises(ValueError, match=message):
            class_names(read, f"{tmp_path}/{source}")
    assert class_names(read, f"{tmp_path}/renamed?image=front&label=fine") == ("a", "b")


def test_embedded_data_need_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", blocker / "cache")
    assert len(load_class_names("embedded", "test")) == 10
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "test.parquet").write_bytes((EMBEDDED_DATA / "test.parquet").read_bytes())
    with pytest.raises(OSError, match="HF_HOME") as error:
        load_data(str(copy), "test", 8)
    assert error.value.errno in (errno.ENOTDIR, errno.EACCES)


@pytest.mark.parametrize("read", list(READERS))
def test_images_cut_off_behind_their_header_are_named(read: str, tmp_path: Path) -> None:
    """The header tells the size, so that the fault is found when the pixels are decoded."""
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for name in ("train/cat/a.jpg", "train/cat/cut.jpg", "train/dog/b.png", "train/dog/short.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(noise).save(tmp_path / name)
    for name in ("train/cat/cut.jpg", "train/dog/short.png"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])

    def all_pixels() -> None:
        data: Any = READERS[read](str(tmp_path), "train", 8)  # type: ignore[operator]
        if read == "on disk":
            data.fetch(torch.arange(4))
        elif read == "streamed":
            list(zip(range(4), data.rows(0, 1, seed=0), strict=False))

    with pytest.raises(ValueError, match=r"(cut\.jpg|short\.png).* could not be read as an image") as caught:
        all_pixels()
    assert read != "in memory" or ("cut.jpg" in str(caught.value) and "short.png" in str(caught.value))
