"""Every program that fills a folder refuses one that another run fills, before it loads anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes import pretrain, train_gate, train_heads
from tests.training.test_tune import data
from zepad_mm import evaluate
from zepad_mm.cli import main
from zepad_mm.defend import defend
from zepad_mm.evaluation import evaluate_suite
from zepad_mm.training import TuneSettings, tune
from zepad_mm.utils.locks import claim

MISSING = "open_clip:local-dir:/nowhere"  # a program that loads it before it claims its folder says so


PROGRAMS: dict[str, Callable[[Path], object]] = {
    "tune": lambda out: tune(TuneSettings(source=MISSING), data(), data(4), out=out),
    "defend": lambda out: defend(MISSING, out=out),
    "evaluate": lambda out: evaluate(model=MISSING, data="embedded", out=out),
    "evaluate several": lambda out: evaluate(models={"a": MISSING}, tasks={"b": "embedded"}, out=out),
    "suite": lambda out: evaluate_suite({"a": MISSING}, "clip13", out=out),
    "heads": lambda out: train_heads.main(train_heads.Recipe(out=str(out), encoders={"a": MISSING})),
    "gate": lambda out: train_gate.main(train_gate.Recipe(out=str(out), model="/nowhere")),
    "pre-training": lambda out: pretrain.main(["--data", "/nowhere", "--out", str(out)]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_refuse_a_folder_that_another_run_fills(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with claim(tmp_path / "run"), pytest.raises(ValueError, match="run is in use by another run"):
        PROGRAMS[name](tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_commands_refuse_a_folder_that_another_run_fills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with claim(tmp_path):
        for words in (["evaluate", "embedded"], ["defend", "open_clip:embedded"]):
            assert main([*words, "--out", str(tmp_path), "--quiet"]) == 2
            said = capsys.readouterr().err
            assert f"{tmp_path} is in use by another run" in said
            assert said.count("\n") == 1
