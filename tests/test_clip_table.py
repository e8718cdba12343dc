"""scripts/clip_table.py in small: every piece is there, a second start makes none again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_clip_table_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import clip_table

    names = ["goldfish", "school bus", "teapot", "acorn"]  # the last two were held out of the text training
    generator = torch.Generator().manual_seed(0)
    pictures = [to_pil_image(torch.rand(3, 64, 64, generator=generator)) for _ in range(8)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    table = Dataset.from_dict({"image": pictures, "label": [0, 1, 2, 3] * 2}, features=features)
    (tmp_path / "few").mkdir()
    table.to_parquet(tmp_path / "few" / "odd-00000-of-00001.parquet")
    few = ["--small", "--out", str(tmp_path), "--work", str(tmp_path / "work"), "--data", f"{tmp_path / 'few'}:odd"]
    few += ["--prompts", "photo", "--attacks", "uapgd", "--ranks", "2"]
    record = json.loads(clip_table.main(clip_table.parse(few)).read_text())
    tasks = {row["task"]: row for row in record["zero_shot"]}
    assert set(tasks) == {"clothing", "few odd, names read", "few odd, names never read"}
    assert [row["names_read"] for row in tasks.values()] == [10, 2, 0]
    assert {row["model"] for row in record["zero_shot"]} == {"undefended", "zepad"}
    for row in (*record["zero_shot"], *record["lora"]):
        assert row["T1"]["accuracy"] <= row["clean"]["accuracy"]
        assert row["T2"]["ci_low"] <= row["T2"]["accuracy"] <= row["clean"]["accuracy"]
    assert [row["rank"] for row in record["lora"]] == [2, 2, 2]
    text = (tmp_path / "clip.md").read_text()
    assert "few odd, names never read (unseen set) | 0 of 2 | photo | zepad" in text
    assert str(tmp_path) not in text + json.dumps(record)
    monkeypatch.setattr(clip_table, "score", lambda *_: pytest.fail("made again"))
    assert json.loads(clip_table.main(clip_table.parse(few)).read_text()) == record
