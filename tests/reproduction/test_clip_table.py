"""reproduction/clip_table.py in small: every piece is there, a second start makes none again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torchvision.transforms.functional import to_pil_image

from zepad_mm.data import load_data

ROOT = Path(__file__).parents[2]


def few(folder: Path, names: list[str]) -> Path:
    """Two random pictures of each name, as the split ``odd``."""
    generator = torch.Generator().manual_seed(len(names))
    pictures = [to_pil_image(torch.rand(3, 64, 64, generator=generator)) for _ in range(2 * len(names))]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    folder.mkdir()
    labels = [*range(len(names)), *range(len(names))]
    Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(folder / "odd-0.parquet")
    return folder


def test_sets_are_joined_under_the_union_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from tools.joint_validation_pool import join

    sources = [f"{few(tmp_path / 'a', ['hat', 'cat', 'acorn'])}:odd", f"{few(tmp_path / 'b', ['dog', 'hat'])}:odd"]
    out = join([sources[0], *sources], tmp_path / "pool", leave_out=["acorn"])
    train, validation = load_data(str(out), "train"), load_data(str(out), "validation")
    assert train.class_names == validation.class_names == ("cat", "dog", "hat")
    assert (len(train), len(validation)) == (3 + 3 + 3, 1 + 1)  # the first set counts twice in training
    named = {}
    for part in (train, validation):
        named |= {
            image.numpy().tobytes(): part.class_names[label]
            for image, label in zip(part.images, part.labels, strict=True)
        }
    for source in ("a", "b"):
        own = load_data(str(tmp_path / source), "odd")
        for image, label in zip(own.images, own.labels, strict=True):
            assert named.get(image.numpy().tobytes(), own.class_names[label]) == own.class_names[label]
    assert len(named) == 4 + 4
    before = (out / "train-0.parquet").stat().st_mtime_ns
    assert join(sources, out) == out
    assert (out / "train-0.parquet").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_clip_table_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from reproduction import clip_table

    names = ["goldfish", "school bus", "teapot", "acorn"]  # the last two were held out of the text training
    folder = few(tmp_path / "few", names)
    small = ["--small", "--out", str(tmp_path), "--work", str(tmp_path / "work"), "--data", f"{folder}:odd"]
    small += ["--prompts", "photo", "--attacks", "uapgd", "--ranks", "0,2"]
    record = json.loads(clip_table.main(clip_table.parse(small)).read_text())
    tasks = {row["task"]: row for row in record["zero_shot"]}
    assert set(tasks) == {"clothing", "few odd, names read", "few odd, names never read"}
    assert [row["names_in_training"] for row in tasks.values()] == [10, 2, 0]
    assert {row["model"] for row in record["zero_shot"]} == {"undefended", "embedded", "general"}
    for row in (*record["zero_shot"], *record["baselines"]):
        assert row["T1"]["accuracy"] <= row["clean"]["accuracy"]
        assert row["T2"]["ci_low"] <= row["T2"]["accuracy"] <= row["clean"]["accuracy"]
    tuned = [(row["defence"], row["rank"]) for row in record["baselines"]]
    assert list(dict.fromkeys(tuned)) == [("tecoa", 0), ("tecoa", 2), ("fare", 0), ("pmg_aft", 0)]
    assert len(tuned) == 4 * len(tasks)
    text = (tmp_path / "clip.md").read_text()
    assert "few odd, names never read (unseen set) | 0 of 2 | photo | embedded |" in text
    assert str(tmp_path) not in text + json.dumps(record)
    monkeypatch.setattr(clip_table, "score", lambda *_: pytest.fail("made again"))
    assert json.loads(clip_table.main(clip_table.parse(small)).read_text()) == record
