"""The joint validation pool and the table of CLIP models, on a few images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torchvision.transforms.functional import to_pil_image

from reproduction import clip_table
from tools.joint_validation_pool import join
from zepad_mm.data import load_data

ROOT = Path(__file__).parents[2]


def few(folder: Path, names: list[str]) -> Path:
    """Two random images of each class name, as the split ``odd``."""
    generator = torch.Generator().manual_seed(len(names))
    images = [to_pil_image(torch.rand(3, 64, 64, generator=generator)) for _ in range(2 * len(names))]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    folder.mkdir()
    labels = [*range(len(names)), *range(len(names))]
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(folder / "odd-0.parquet")
    return folder


def test_join_uses_the_union_of_the_class_names(tmp_path: Path) -> None:
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
def test_clip_table_evaluates_every_model_and_baseline(tmp_path: Path) -> None:
    names = ["goldfish", "school bus", "lampshade", "acorn"]  # the last two were held out of the text training
    folder = few(tmp_path / "few", names)
    words = ["--config", str(ROOT / "reproduction" / "configs" / "clip_smoke.yaml"), "--data", f"[{folder}:odd]"]
    words += ["--out", str(tmp_path / "out"), "--result", str(tmp_path)]
    config = clip_table.ClipTable.from_cli(words)
    record = clip_table.main(config)
    assert json.loads((tmp_path / "clip.json").read_text())["zero_shot"] == record["zero_shot"]
    tasks = {row["task"]: row for row in record["zero_shot"]}
    assert set(tasks) == {"clothing", "few odd, names read", "few odd, names never read"}
    assert [row["names_in_training"] for row in tasks.values()] == [10, 2, 0]
    assert {row["model"] for row in record["zero_shot"]} == {"undefended", "embedded"}
    for row in (*record["zero_shot"], *record["baselines"]):
        assert row["T1"]["accuracy"] <= row["clean"]["accuracy"]
        assert row["T2"]["ci_low"] <= row["T2"]["accuracy"] <= row["clean"]["accuracy"]
    tuned = [(row["defence"], row["rank"]) for row in record["baselines"]]
    assert list(dict.fromkeys(tuned)) == [("tecoa", 0), ("tecoa", 2), ("fare", 0), ("pmg_aft", 0)]
    assert len(tuned) == 4 * len(tasks)
    assert len(list((tmp_path / "out" / "perturbations").glob("uapgd*"))) == 1  # crafted once for all tasks
    assert str(tmp_path) not in (tmp_path / "clip.md").read_text() + json.dumps(record)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert clip_table.main(config)["baselines"] == record["baselines"]
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}


def test_committed_clip_markdown_is_that_of_the_committed_record() -> None:
    record = json.loads((ROOT / "results" / "clip.json").read_text())
    assert (ROOT / "results" / "clip.md").read_text() == clip_table.markdown(record)
