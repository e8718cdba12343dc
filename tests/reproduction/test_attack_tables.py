"""The tables of universal and of adaptive attacks, on a few images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reproduction import adaptive_table, universal_attacks_table
from tests.helpers.models import write_embedded_at
from zepad_mm.models.zepad import ZePAD

ROOT = Path(__file__).parents[2]
IMAGES = ["--evaluation.n", "6", "--evaluation.n_validation", "8", "--evaluation.n_surrogate", "16"]


@pytest.fixture(autouse=True)
def _few_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model at 32 pixels in place of the shipped one."""
    read, small = ZePAD.from_pretrained, write_embedded_at(32, tmp_path / "model")
    monkeypatch.setattr(ZePAD, "from_pretrained", lambda name: read(small))


@pytest.mark.slow
def test_adaptive_table_has_every_attack_and_the_worst_case(tmp_path: Path) -> None:
    config = ["--config", str(ROOT / "reproduction" / "configs" / "adaptive.yaml"), *IMAGES, "--evaluation.steps", "1"]
    config += ["--out", str(tmp_path / "out"), "--result", str(tmp_path)]
    settings = adaptive_table.AdaptiveTable.from_cli(config)
    record = adaptive_table.main(settings)
    assert json.loads((tmp_path / "adaptive_on_rfdm.json").read_text())["attacks"] == record["attacks"]
    assert set(record["attacks"]) == {adaptive_table.GENERIC, *adaptive_table.FUSED_LOSSES}
    aware = [row["accuracy"] for name, row in record["attacks"].items() if name != adaptive_table.GENERIC]
    assert 0 <= record["adaptive"]["accuracy"] <= min(aware) <= max(aware) <= record["clean"]["accuracy"]
    assert record["strongest"] in record["attacks"]
    assert adaptive_table.main(settings)["attacks"] == record["attacks"]


@pytest.mark.slow
def test_universal_attacks_table_scores_clip_and_defence(tmp_path: Path) -> None:
    config = ["--config", str(ROOT / "reproduction" / "configs" / "universal_attacks.yaml"), *IMAGES]
    config += ["--attacks", "[feature_uap, adv_clip]", "--out", str(tmp_path / "out"), "--result", str(tmp_path)]
    config += ["--evaluation.universal_steps", "{feature_uap: 1, adv_clip: 1}"]
    settings = universal_attacks_table.UniversalTable.from_cli(config)
    report = universal_attacks_table.main(settings)
    assert {row["algorithm"] for row in report.rows} == {
        "none", "random_noise", "random_patch", "feature_uap", "adv_clip"
    }  # fmt: skip
    assert {row["model"] for row in report.rows} == {"zepad", "undefended"}
    assert all(0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1 for row in report.rows)
    table = (tmp_path / "dae_attacks.md").read_text()
    assert "3 % of the area" in table
    assert "10/255" in table


@pytest.mark.parametrize("table", [adaptive_table, universal_attacks_table])
def test_committed_markdown_is_that_of_the_committed_record(table) -> None:
    record = json.loads((ROOT / "results" / f"{table.NAME}.json").read_text())
    if table is universal_attacks_table:
        record = universal_attacks_table.Report(record["meta"], record["rows"])
    assert (ROOT / "results" / f"{table.NAME}.md").read_text() == table.markdown(record)
