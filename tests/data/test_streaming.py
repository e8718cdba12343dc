"""Streams: every row exactly once per epoch, whatever the files' sizes and the number of readers."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pytest
from PIL import Image as PILImage

from tests.data.test_folders import write_images, write_parquet
from zepad_mm.data import StreamedImages, stream_images
from zepad_mm.data.streaming import RowGroup, share_of_epoch

N = 80


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> StreamedImages:
    """Two files of 8 and 72 rows; the label of a row is its number."""
    folder, names = tmp_path_factory.mktemp("uneven"), [str(row) for row in range(N)]
    write_parquet(folder / "train-00000.parquet", range(8), names)
    write_parquet(folder / "train-00001.parquet", range(8, N), names)
    return stream_images(str(folder), "train", 8, shuffle_buffer=8)


def labels(stream: StreamedImages, rank: int, world: int, count: int, skip: int = 0, seed: int = 0) -> list[int]:
    return [label for _, label in islice(stream.rows(rank, world, seed, skip), count)]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 100])
def test_every_epoch_has_every_row_once(uneven: StreamedImages, world: int) -> None:
    epochs = 3
    read: list[Counter[int]] = [Counter() for _ in range(epochs)]
    for rank in range(world):
        bounds = [share_of_epoch(N, epoch, rank, world) for epoch in range(epochs)]
        counts = [end - begin for begin, end in bounds]
        found = labels(uneven, rank, world, sum(counts))
        for epoch, count in enumerate(counts):
            read[epoch].update(found[sum(counts[:epoch]) :][:count])
        assert abs(sum(counts) - epochs * N / world) < 1  # no reader gets ahead
    assert all(one == Counter(range(N)) for one in read)


def test_parquet_files_of_the_hub_are_dealt_as_those_of_a_folder(
    uneven: StreamedImages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their ends are read over a URL; the rows of an epoch are those of the folder, in the same order."""
    urls = sorted({f"file://{unit.file}" for unit in uneven.units if isinstance(unit, RowGroup)})
    builder, load = datasets.load_dataset_builder, datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder("parquet", data_files={"train": urls}))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **more: load("parquet", data_files={"train": urls}, **more)
    )
    stream = stream_images("owner/name", "train", 8, shuffle_buffer=8)
    assert [unit.size for unit in stream.units] == [8, 72]
    assert not caplog.records
    for rank in range(2):
        assert labels(stream, rank, 2, 80) == labels(uneven, rank, 2, 80)


def test_a_stream_of_unknown_length_is_warned_of(
    uneven: StreamedImages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = [str(unit.file) for unit in uneven.units if isinstance(unit, RowGroup)]
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **more: load("parquet", data_files={"train": files}, **more)
    )
    monkeypatch.setattr("zepad_mm.data.streaming._hub_units", lambda *_: ())
    stream = stream_images("owner/name", "train", 8)
    assert sorted(labels(stream, 0, 1, N)) == list(range(N))
    assert "rows of small files are seen more often" in caplog.text


def test_order_follows_from_the_seed_and_a_late_start_changes_nothing(uneven: StreamedImages) -> None:
    whole = labels(uneven, 1, 2, 120)
    assert labels(uneven, 1, 2, 120) == whole
    assert labels(uneven, 1, 2, 120, seed=1) != whole
    for skip in (1, 39, 40, 41, 100):
        assert labels(uneven, 1, 2, 120 - skip, skip) == whole[skip:]
    assert whole[:40] != whole[40:80]


def test_rows_keep_their_images_and_names(tmp_path: Path) -> None:
    source = write_images(tmp_path, *(f"train/{name}/{i}.png" for name in ("a", "b") for i in range(3)))
    stream = stream_images(source, "train", 8, shuffle_buffer=2)
    seen = {(round(float(image.max()) * 255), label) for image, label in islice(stream.rows(0, 1, 0), 6)}
    assert seen == {(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)}
    PILImage.new("L", (8, 8)).save(tmp_path / "train" / "b" / "1.png")
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"row 4 \(.*b/1.png\).*the file is empty|row 4 \(process 0\) \(.*b/1.png\)"):
        list(islice(stream.rows(0, 1, 0), 6))
