"""The demo on the embedded model at 64 pixels, with the smoke preset, reproduces committed rows.

No refactoring moves a number. After a change of the embedded images or models,
``python -m tests.evaluation.test_regression`` writes the rows again.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.helpers.models import write_embedded_at
from zepad_mm.evaluation import Report

ROOT = Path(__file__).parents[2]
EXPECTED = Path(__file__).parent
ONE_IMAGE = 1.001  # other hardware may round one image to the other side of a decision


def expected(name: str) -> list[dict[str, str]]:
    with (EXPECTED / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def committed(rows: list[dict[str, Any]], wanted: list[dict[str, str]], *keys: str) -> list[dict[str, Any]]:
    """The rows that the file holds; a fusion rule or suspicion score that was registered since adds others."""
    known = {tuple(line[key] for key in keys) for line in wanted}
    return [row for row in rows if tuple(str(row[key]) for key in keys) in known]


@pytest.fixture(scope="module")
def demo(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    return made_once("demo", run_demo) / "report"


@pytest.fixture(scope="module")
def report(demo: Path) -> Report:
    return Report.load(demo)


def run_demo(out: Path, timeout: float | None = 280) -> None:
    """The script behind scripts/demo, with the smoke preset; its report is in ``out``/report."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    model = write_embedded_at(64, out / "model")
    command = [sys.executable, "scripts/demo.py", "--preset", "smoke", "--model", str(model)]
    command += ["--out", str(out / "report")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_demo_writes_report_and_plots(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    assert {"commit", "config", "seed", "hardware", "versions", "wall_s", "warnings"} <= set(report["meta"])
    assert {row["threat"] for row in report["rows"]} == {"clean", "T1", "T1b", "T1i", "T2", "T3"}
    models = {row["model"] for row in report["rows"]}
    assert {"undefended", "zepad", "zepad:rfdm", "baseline:equal", "branch:fare"} <= models
    assert {row["score"] for row in report["detection"]} >= {"confidence_gap", "jensen_shannon"}
    for name in ("confidence", "contact_sheet", "accuracy"):
        assert (demo / f"{name}.png").stat().st_size > 10_000


def test_smoke_rows_match_the_committed_rows(report: Report) -> None:
    wanted = expected("smoke_rows.csv")
    rows = committed(report.rows, wanted, "model", "attack", "threat")
    for row, line in zip(rows, wanted, strict=True):
        for key in ("model", "attack", "threat", "norm", "dataset", "n", "control"):
            assert str(row[key]) == line[key], line
        assert row["epsilon"] == pytest.approx(float(line["epsilon"]), abs=1e-6), line
        moved = abs(row["accuracy"] * row["n"] - int(line["correct"]))
        assert moved <= ONE_IMAGE, line
        if moved < 0.5:
            interval = (float(line["ci_low"]), float(line["ci_high"]))
            assert (row["ci_low"], row["ci_high"]) == pytest.approx(interval, abs=1e-6), line


def test_smoke_detection_matches_the_committed_rows(report: Report) -> None:
    wanted = expected("smoke_detection.csv")
    rows = committed(report.detection, wanted, "model", "score", "threat", "attack")
    for row, line in zip(rows, wanted, strict=True):
        for key in ("model", "score", "threat", "attack", "adaptive"):
            assert str(row[key]) == line[key], line
        assert abs(row["n"] - int(line["n"])) <= 1, line
        if row["n"] == int(line["n"]):
            for key in ("auroc", "tpr_at_fpr1", "tpr_at_fpr5", "fpr_at_fpr1", "fpr_at_fpr5", "accuracy_paper_rule"):
                assert _close(row[key], line[key], 1.001 / min(row["n"], 24)), (key, line)


def _close(value: Any, text: str, tolerance: float) -> bool:
    return text == "" if value is None else abs(value - float(text)) <= tolerance


def write_expected(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the committed rows again, numbers to six digits."""
    header = list(expected(name)[0])
    lines = [{**row, "correct": round(row["accuracy"] * row["n"])} if "correct" in header else row for row in rows]
    with (EXPECTED / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for line in lines:
            writer.writerow({key: round(cell, 6) if isinstance(cell, float) else cell for key, cell in line.items()})


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        run_demo(Path(folder), timeout=None)
        made = Report.load(Path(folder) / "report")
    write_expected("smoke_rows.csv", made.rows)
    write_expected("smoke_detection.csv", made.detection)
