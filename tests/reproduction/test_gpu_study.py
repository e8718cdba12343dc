"""The study on one GPU: its settings, and a run on a few images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reproduction import gpu_study
from zepad_mm.defences import make_defence


def test_gpu_study_builds_defences_of_known_tunings() -> None:
    for tuning in gpu_study.TUNINGS.values():
        make_defence(tuning.defence, tuning.options)
    names = {name for branches in gpu_study.DEFENCES.values() for name in branches} | set(gpu_study.CONTROLS)
    assert {name.partition("+")[2] for name in names} - {""} == set(gpu_study.TUNINGS)
    assert gpu_study.parse([]).defences == list(gpu_study.DEFENCES)


def test_gpu_study_rejects_an_unknown_defence() -> None:
    with pytest.raises(ValueError, match="expected names of paper_corrected"):
        gpu_study.parse(["--small", "--defences", "[fares]"])


@pytest.mark.slow
def test_gpu_study_small_evaluates_a_defence_with_its_controls(tmp_path: Path) -> None:
    result = tmp_path / "result"
    report = gpu_study.main(gpu_study.parse(["--small", "--out", str(tmp_path / "run"), "--result", str(result)]))
    models = {row["model"] for row in report.rows}
    assert {"fare", "fare/undefended", "fare/branch:victim+fare", "fare/zepad:rfdm"} <= models
    assert {"fare/baseline:victim+clean", "fare/baseline:untuned_ensemble"} <= models
    assert {row["threat"] for row in report.rows} == {"clean", "T1", "T2"}
    record = json.loads(result.with_suffix(".json").read_text())
    assert set(record["meta"]["pretraining"]) == {"victim", "adv_au", "bmp"}
    assert set(record["meta"]["tuning"]) == {"victim+fare", "adv_au+fare", "bmp+clean_own", "victim+clean"}
    assert all(run["steps"] == 1 for run in record["meta"]["tuning"].values())
    assert str(tmp_path) not in json.dumps(record)
    assert result.with_suffix(".md").is_file()
