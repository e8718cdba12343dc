"""Labelled images from class folders, parquet files and the embedded splits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from zepad_mm.data import CATALOGUE, EMBEDDED_SIZE, LabelledImages, load_data, load_embedded, to_tensor
from zepad_mm.data.loading import hub_name


def test_load_data_reads_class_folders_and_names_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for name, colour in (("red_ball", "red"), ("blue", "blue")):
            folder = tmp_path / "folders" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20 + index, 10), colour).save(folder / f"{index}.png")
    data = load_data(str(tmp_path / "folders"), "train", image_size=16)
    assert data.class_names == ("blue", "red ball")
    assert data.images.shape == (6, 3, 16, 16)
    assert set(data.labels.tolist()) == {0, 1}
    torch.testing.assert_close(data.images[data.labels == 1].mean((0, 2, 3)), torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(FileNotFoundError, match="neither a folder here nor reachable"):
        load_data("no-such-owner/no-such-set", "train")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the Hub is asked"))
    for name, hint in (("photos", ""), ("embeded", "; did you mean 'embedded'.")):
        with pytest.raises(FileNotFoundError, match=rf"nor a name on the Hub, which is written owner/name{hint}"):
            load_data(name, "train")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_data(str(tmp_path / "nowhere"), "train")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train-0.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match="not a complete parquet file"):
        load_data(str(tmp_path / "cut"), "train")
    with pytest.raises(FileNotFoundError, match="no split 'test'; it has train"):
        load_data(str(tmp_path / "cut"), "test")


def test_hub_name_is_that_of_data_read_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"owner/photos?image=a&label=b": "owner/photos", "wds:owner/wds_pets@main": "owner/wds_pets"}
    names |= {name: CATALOGUE.get(name).hub for name in CATALOGUE}
    assert {source: hub_name(source) for source in names} == names
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "photos").mkdir(parents=True)
    assert [hub_name(source) for source in ("embedded", "owner/photos", "wds:owner/photos")] == [None, None, None]


def test_load_embedded_splits_are_disjoint() -> None:
    seen: dict[bytes, str] = {}
    for split in ("surrogate", "train", "validation", "test"):
        images, labels = load_embedded(split)
        assert images.shape[1:] == (3, EMBEDDED_SIZE, EMBEDDED_SIZE)
        assert set(labels.tolist()) == set(range(10))
        for image in images:
            key = (image * 255).byte().numpy().tobytes()
            assert seen.setdefault(key, split) == split
    assert len(load_embedded("test")[0]) >= 500
    few, _ = load_embedded("test", n=7)
    assert len(few) == 7
    with pytest.raises(ValueError, match="positive"):
        load_embedded("test", n=0)
    with pytest.raises(FileNotFoundError, match="no split 'tset'"):
        load_embedded("tset")


def test_sample_depends_on_the_seed() -> None:
    data = LabelledImages(torch.rand(10, 3, 2, 2), torch.arange(10), ("a",), "x")
    assert data.sample(4, seed=1).labels.tolist() == data.sample(4, seed=1).labels.tolist()
    assert data.sample(4, seed=1).labels.tolist() != data.sample(4, seed=2).labels.tolist()
    assert len(data.sample(None)) == 10
    assert [len(y) for _, y in data.batches(4)] == [4, 4, 2]
    assert to_tensor(Image.new("L", (3, 2))).shape == (3, 2, 3)
