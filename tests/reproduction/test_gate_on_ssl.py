"""The gate on SSL victims: the whole study of a tiny encoder, and its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import pretrain
from reproduction import gate_on_ssl
from reproduction.gate_on_ssl_page import page
from zepad_mm.utils.io import read_json

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "reproduction" / "configs"


def test_config_parses() -> None:
    settings = gate_on_ssl.Settings.from_cli(["--config", str(CONFIGS / "gate_on_ssl.yaml")])
    assert len(settings.evaluation.universal) == 7
    assert settings.surrogate not in (*settings.tasks, *settings.tuned_on)
    assert set(settings.evaluation.universal) - set(settings.gate.universal)


def test_study_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    smoke = ["--config", str(ROOT / "recipes" / "configs" / "smoke" / "pretrain.yaml"), "--n", "32", "--epochs", "1"]
    pretrain.main([*smoke, "--batch_size", "16", "--out", str(tmp_path / "victim")])
    words = ["--config", str(CONFIGS / "gate_on_ssl_smoke.yaml"), "--out", str(tmp_path / "out")]
    words += ["--victims", json.dumps({"tiny": str(tmp_path / "victim")}), "--result", str(tmp_path / "gate_ssl")]
    gate_on_ssl.main(gate_on_ssl.Settings.from_cli(words))
    record = read_json(tmp_path / "gate_ssl.json")
    assert str(tmp_path) not in json.dumps(record)
    one = record["victims"]["tiny"]["sets"]["embedded"]
    assert {row["model"] for row in one["rows"]} == {"undefended", "robust", "gated"}
    assert {row["score"] for row in one["detection"]} == set(gate_on_ssl.SCORES)
    assert 0 <= one["false_alarms"]["share"] <= 1
    text = (tmp_path / "gate_ssl.md").read_text(encoding="utf-8")
    assert text == page(record)
    assert "feature_uap are in the gate's training" in text

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(gate_on_ssl, "train_gate", fail)
    gate_on_ssl.main(gate_on_ssl.Settings.from_cli(words))
    assert read_json(tmp_path / "gate_ssl.json")["victims"] == record["victims"]


def test_page_of_the_committed_record_is_up_to_date() -> None:
    record = ROOT / "results" / "gate_ssl.json"
    assert record.with_suffix(".md").read_text(encoding="utf-8") == page(read_json(record))
