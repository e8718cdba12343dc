"""Progress in words, and the log file of an output folder."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from tests.training.test_fit import quick, run
from zepad_mm.evaluation.session import plain_name
from zepad_mm.utils import progress
from zepad_mm.utils.progress import FILE, duration, log_file, say

log = logging.getLogger("zepad_mm.test")


def test_log_file_gets_lines_whatever_the_caller_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger("zepad_mm").handlers[:], logging.getLogger("zepad_mm").level
    (tmp_path / "inside").mkdir()
    with log_file(tmp_path), log_file(tmp_path / "inside"):
        say(log, "stage %d of %d", 1, 2)
        log.warning("two\nlines")
    say(log, "after the end")
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "stage 1 of 2",
        "warning: two lines",
    ]
    assert not (tmp_path / "inside" / FILE).exists()
    assert "stage" not in capsys.readouterr().err
    assert (logging.getLogger("zepad_mm").handlers, logging.getLogger("zepad_mm").level) == before


def test_log_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).symlink_to(target)
    with log_file(tmp_path / "out"):
        log.warning("text")
    assert target.read_text() == "kept"


def test_fit_logs_its_steps_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", -1.0)
    run(tmp_path, settings=quick(epochs=1, steps=3))
    text = (tmp_path / FILE).read_text()
    assert re.search(r"tuning by tecoa: step 2 of 3, about \d+ s left", text), text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (600, "10 min"), (7200, "2.0 h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("stage", "text"),
    [("clean none", "clean images"), ("validation", "validation images"), ("T2 mora@a_b", "T2: mora on a b")],
)
def test_plain_name_of_a_stage(stage: str, text: str) -> None:
    assert plain_name(stage) == text
