"""The command line as a person meets it: help, errors in one line, JSON, and a real run on small networks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_zepad
from PIL import Image

from zepad_mm import __version__
from zepad_mm.attacks import Perturbation
from zepad_mm.cli import budget, main


@pytest.fixture(scope="module")
def saved(clip_source: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A defended model on disk."""
    folder = tmp_path_factory.mktemp("model")
    make_zepad(clip_source).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Class folders of a data set nobody has seen."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (torch.rand(32, 32, 3, generator=generator) * 255).byte().numpy()
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return str(folder)


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from zepad_mm.cli import main\n"
        "for words in (['--help'], ['--version'], ['evaluate', '--help'], ['nonsense'], []):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'datasets', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    for word in ("evaluate", "classify", "attack", "report", "doctor", "--threats", __version__):
        assert word in done.stdout


@pytest.mark.parametrize(("text", "value"), [("4/255", 4 / 255), ("0.0157", 0.0157), ("8/255", 8 / 255), ("1", 1.0)])
def test_budgets(text: str, value: float) -> None:
    assert budget(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["8", "0", "-1/255", "4/0", "four", "", "nan", "4/255/2"])
def test_budgets_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(ValueError, match="--eps: expected a budget"):
        budget(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "invalid choice"),
        (["evaluate"], "model"),
        (["evaluate", "embedded", "--eps", "8"], "--eps: expected a budget"),
        (["evaluate", "embedded", "--norm", "l2"], "--eps: another norm needs a budget"),
        (["evaluate", "embedded", "--norm", "l1", "--eps", "0.5"], "norm: expected one of linf, l2"),
        (["evaluate", "embedded", "--n", "many"], "many"),
        (["evaluate", "embedded", "--threats", "T9"], "unknown threat 'T9'"),
        (["evaluate", "embedded", "--preset", "dmo"], "did you mean 'demo'"),
        (["evaluate", "./nowhere"], "nowhere"),
        (["classify", "embedded", "no.png", "--labels", "a,b"], "no.png does not exist"),
        (["classify", "embedded", __file__, "--labels", ","], "--labels: expected names"),
        (["attack", "open_clap:embedded"], "did you mean 'open_clip'"),
        (["attack", "open_clip:embedded", "--attack", "uapp"], "unknown universal attack"),
    ],
)
def test_a_users_error_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("zepad: ")
    assert message in said.err
    assert said.err.count("\n") == 1


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["zepad-mm"] == __version__
    assert found["shipped"]["clothing"]
    main(["doctor"])
    assert "torch" in capsys.readouterr().out


def test_evaluate_on_pictures_of_ones_own(
    saved: str, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model was saved for other classes: it is pointed at those of the folders."""
    out = tmp_path / "out"
    words = ["evaluate", saved, "--data", pictures, "--threats", "T2", "--eps", "2/255", "--n", "5", "--out", str(out)]
    words += ["--preset", "smoke"]
    assert main([*words, "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "report.json").read_text())
    assert printed["meta"]["config"]["model"]["class_names"] == ["cat", "dog"]
    assert {row["epsilon"] for row in printed["rows"] if row["threat"] == "T2"} == {2 / 255}
    assert {row["n"] for row in printed["rows"]} == {5}
    for name in ("report.md", "records.parquet", "accuracy.png", "confidence.png"):
        assert (out / name).is_file()
    assert main([*words, "--resume", "--no-figures", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("# Robustness on")


def test_classify(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    assert main(["classify", saved, str(picture), str(picture), "--labels", "cat, dog", "--json", "--evidence"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == [str(picture)] * 2
    assert {one["label"] for one in answers[0]["answer"]["labels"]} == {"cat", "dog"}
    assert set(answers[0]["answer"]["evidence"]["confidences"]) == {"full", "lora", "benign"}
    assert main(["classify", saved, str(picture), "--labels", "cat,dog", "--top", "1", "--evidence"]) == 0
    assert "flagged" in capsys.readouterr().out


def test_attack_writes_a_perturbation(
    clip_source: str, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "delta.safetensors"
    words = ["attack", clip_source, "--data", pictures, "--eps", "6/255", "--steps", "2", "--image-size", "32"]
    assert main([*words, "--out", str(out), "--json", "--quiet"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["epsilon"] == pytest.approx(6 / 255)
    assert Perturbation.load(out, 6 / 255).delta.shape == (3, 32, 32)
