"""Webdatasets of CLIP_benchmark: read from the Hub and from folders, pinned, and refused where they may hold code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.hub_server import reached_through, running_hub
from tests.helpers.webdatasets import webdataset
from zepad_mm.data import SplitNotFoundError, load_class_names, load_data, load_templates
from zepad_mm.data.webdataset import Webdataset

NAMES = ("cat", "missile", "traffic_light", "Missile")


def written(folder: Path, files: dict[str, bytes]) -> str:
    """Write the files; returns the source of the folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return f"wds:{folder}"


def test_webdataset_of_a_folder(tmp_path: Path) -> None:
    source = written(tmp_path, webdataset(NAMES, images=9, shards=2))
    data = load_data(source, "test", 16)
    assert data.images.shape == (9, 3, 16, 16)
    assert data.class_names == load_class_names(source, "test") == ("cat", "missile", "traffic light", "Missile 2")
    assert sorted(data.labels.tolist()) == sorted(row % 4 for row in range(9))
    assert load_templates(source) == ("a photo of a {}.", "a blurry photo of a {}.")
    assert load_templates("embedded") is None
    with pytest.raises(SplitNotFoundError, match="no split 'train'"):
        load_data(source, "train", 16)


def test_webdataset_of_the_hub_is_pinned(tmp_path: Path) -> None:
    with running_hub() as hub, reached_through(hub, tmp_path / "cache"):
        first = hub.put("datasets/owner/wds_pets", webdataset(NAMES, seed=1))
        pinned = Webdataset("owner/wds_pets").pinned()
        assert str(pinned) == f"wds:owner/wds_pets@{first}"
        hub.put("datasets/owner/wds_pets", webdataset(("dog", "bird"), seed=2))
        assert load_data(str(pinned), "test", 16).class_names[0] == "cat"
        assert load_data("wds:owner/wds_pets", "test", 16).class_names == ("dog", "bird")
        with pytest.raises(PermissionError, match="owner/nobody is private or does not exist"):
            load_data("wds:owner/nobody", "test", 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": {"s0000099.pyd": b"cos\nsystem\n(S'true'\ntR."}}, "holds 's0000099.pyd'; expected files that end in"),
        ({"more": {"s0000099.pickle": b""}}, "s0000099.pickle"),
        ({"more": {"s0000099.pth": b""}}, "s0000099.pth"),
        ({"more": {"s0000099.cls": b"7", "s0000099.webp": b"RIFF"}}, "7"),
        ({"test/1.tar": b"no tar"}, "no complete tar file"),
        ({"test/nshards.txt": b"-1"}, "expected the number of shards"),
        ({"classnames.txt": b"\n"}, "is empty"),
        ({"zeroshot_classification_templates.txt": b"no place"}, "expected exactly one"),
    ],
)
def test_webdataset_of_another_form_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    more = change.pop("more", None)
    source = written(tmp_path, webdataset(NAMES, more=more) | change)
    with pytest.raises(ValueError, match=message):
        _ = load_data(source, "test", 16), load_templates(source)


@pytest.mark.parametrize("source", ["wds:", "wds:owner/name@"])
def test_source_of_a_webdataset_names_one(source: str) -> None:
    with pytest.raises(ValueError, match="expected wds:OWNER/NAME"):
        load_data(source, "test", 16)
