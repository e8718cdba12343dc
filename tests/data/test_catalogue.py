"""The dataset catalogue: entries are opened, checked and split by fixed row indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage

from zepad_mm.data import CATALOGUE, CatalogueEntry, load_data, stream_images
from zepad_mm.data.catalogue import find_entry, rows_digest, split_rows

NAMES = ("cat", "dog")
Stored = Callable[..., CatalogueEntry]


def write(folder: Path, split: str, names: Sequence[str], rows: int, column: str) -> None:
    """Write ``rows`` images of increasing brightness in the format of a Hub repository."""
    features = Features({column: Image(), "domain": Value("string"), "label": ClassLabel(names=list(names))})
    rows_of = {
        column: [PILImage.new("RGB", (8, 8), (row, row, row)) for row in range(rows)],
        "domain": ["photo" if row % 2 else "sketch" for row in range(rows)],
        "label": [row % 2 for row in range(rows)],
    }
    (folder / "data").mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows_of, features=features).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stored:
    """A dataset of 20 training images on disk with a catalogue entry named ``toy``."""

    def make(names: Sequence[str] = ("Cat", "Dog"), column: str = "image", **changes: object) -> CatalogueEntry:
        write(tmp_path / "repository", "train", names, 20, column)
        entry = CatalogueEntry(
            name="toy",
            hub=str(tmp_path / "repository"),
            sizes={"train": 20},
            class_names=NAMES,
            evidence="a test",
        )
        entry = replace(entry, **changes)  # type: ignore[arg-type]
        monkeypatch.setitem(CATALOGUE._entries, "toy", entry)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        return entry

    return make


def with_shares(shares: dict[str, float]) -> dict[str, object]:
    digests = {split: rows_digest(rows) for split, rows in split_rows("toy", 20, shares).items()}
    return {"shares": shares, "digests": digests}


def test_load_data_short_name_uses_the_entry_class_names(stored: Stored) -> None:
    stored(column="img", image_column="img")
    data = load_data("toy", "train", 8)
    assert (len(data), data.class_names, data.name) == (20, NAMES, "toy")


def test_own_splits_are_fixed_and_disjoint(stored: Stored) -> None:
    stored(**with_shares({"test": 0.2, "validation": 0.1, "train": 0.7}))
    torch.manual_seed(1)
    parts = {split: load_data("toy", split, 8) for split in ("train", "validation", "test")}
    torch.manual_seed(2)
    again = load_data("toy", "test", 8)
    assert torch.equal(parts["test"].images, again.images)
    assert [len(part) for part in parts.values()] == [14, 2, 4]
    shades = torch.cat([part.images[:, 0, 0, 0] for part in parts.values()])
    assert len(shades.unique()) == 20


def test_own_split_with_another_digest_raises(stored: Stored) -> None:
    stored(shares={"test": 0.5, "train": 0.5}, digests={"test": "0", "train": "0"})
    with pytest.raises(ValueError, match=r"split 'test' of toy.*committed is 0"):
        load_data("toy", "test", 8)


def test_own_split_of_a_dataset_of_another_size_raises(stored: Stored) -> None:
    stored(sizes={"train": 30}, **with_shares({"test": 0.5, "train": 0.5}))
    with pytest.raises(ValueError, match=r"20 rows; the catalogue \(a test\) has 30.*fixed splits"):
        load_data("toy", "test", 8)


def test_own_split_cannot_be_streamed(stored: Stored) -> None:
    stored(**with_shares({"held_out": 0.1, "tune": 0.9}))
    with pytest.raises(ValueError, match=r"'tune' of toy.*storage='memory'"):
        stream_images("toy", "tune", 8)


def test_other_sizes_and_class_names_are_logged(stored: Stored, caplog: pytest.LogCaptureFixture) -> None:
    stored(names=("kitten", "dog"), sizes={"train": 30})
    assert load_data("toy", "train", 8).class_names == ("kitten", "dog")
    assert "20 rows; the catalogue (a test) has 30" in caplog.text
    assert "names its classes kitten, dog; the catalogue has cat, dog" in caplog.text


def test_other_classes_and_columns_raise(stored: Stored) -> None:
    stored(class_names=("cat", "dog", "horse"))
    with pytest.raises(ValueError, match=r"Cat.*expects 3 classes: cat, dog, horse"):
        load_data("toy", "train", 8)
    stored(image_column="pixels")
    with pytest.raises(ValueError, match=r"columns image, domain, label.*expects pixels"):
        load_data("toy", "train", 8)


def test_split_column_values_are_splits(stored: Stored) -> None:
    stored(split_column="domain", sizes={"photo": 10, "sketch": 10})
    assert load_data("toy", "photo", 8).labels.unique().tolist() == [1]
    with pytest.raises(FileNotFoundError, match="no split 'train'; it has photo, sketch"):
        load_data("toy", "train", 8)


def test_unavailable_dataset_error_says_what_to_do(stored: Stored, tmp_path: Path) -> None:
    stored(hub=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"'toy' is neither.*nowhere.*Give the path of a folder.*svhn"):
        load_data("toy", "train", 8)
    with pytest.raises(FileNotFoundError, match=r"'imagenet20' is not on the Hub in this form.*path of a folder"):
        load_data("imagenet20", "train")


def test_damaged_dataset_of_the_hub_is_no_missing_one(stored: Stored) -> None:
    entry = stored()
    file = Path(entry.hub or "") / "data" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="'toy' is there and cannot be read"):
        load_data("toy", "train", 8)


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_catalogue_entries_are_consistent(name: str) -> None:
    entry = CATALOGUE.get(name)
    assert entry.name == name
    assert find_entry(entry.hub or name) is entry
    assert len(set(entry.class_names)) == len(entry.class_names) > 1
    rows = [entry.rows(split) for split in entry.shares]
    if rows:
        assert sorted(row for part in rows for row in part) == list(range(entry.sizes["train"]))
    wanted = {"gtsrb": 43, "imagenet20": 20, "tinyimagenet80": 80, "pacs": 7}
    assert len(entry.class_names) == wanted.get(name, 10)
