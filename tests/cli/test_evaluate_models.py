"""``zepad evaluate`` on plain CLIPs of any library, on several models and data sets, and on a suite of the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.test_cli import photos
from tests.helpers.encoder_zoo import ZOO
from tests.helpers.hub_server import environment, reached_through, running_hub
from tests.helpers.models import ConvNet
from tests.helpers.webdatasets import webdataset
from zepad_mm import evaluate
from zepad_mm.cli import main
from zepad_mm.data.catalogue import rows_digest
from zepad_mm.evaluation import PRESETS, Report
from zepad_mm.evaluation.suites import SUITES, Suite, evaluate_suite

__all__ = ["photos"]  # a fixture of other commands, too
SMALL = ["--preset", "smoke", "--threats", "T2", "--eps", "2/255", "--n", "4", "--no-figures", "--quiet"]


@pytest.mark.parametrize("kind", ["open_clip", "hf"])
def test_plain_clip_is_evaluated(
    kind: str, clip_source: str, photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = clip_source if kind == "open_clip" else ZOO["hf: CLIP"](tmp_path).source
    assert main(["evaluate", source, "--data", photos, *SMALL, "--out", str(tmp_path / "out")]) == 0
    report, text = Report.load(tmp_path / "out"), capsys.readouterr().out
    assert report.models == ["model"]
    assert report.meta["config"]["model"]["source"] == source
    assert report.accuracy("model", "T2") <= report.accuracy("model")
    assert "An attacker who knows everything" in text


def test_published_protocol_is_at_full_strength_for_one_network(clip_source: str, photos: str, tmp_path: Path) -> None:
    words = [
        "evaluate",
        clip_source,
        "--data",
        photos,
        "--preset",
        "apgd_ce_t",
        "--eps",
        "4/255",
        "--n",
        "3",
        "--quiet",
    ]
    assert main([*words, "--out", str(tmp_path)]) == 0
    report = Report.load(tmp_path)
    assert report.row("model", "T2")["strength"] == "full"
    assert {row["attack"].partition("@")[0] for row in report.rows} == {"none", "worst", "apgd_ce", "apgd_targeted"}
    assert not PRESETS.get("apgd_ce_t").full_strength()  # of a fused model, whose parts an attacker would aim at


def test_several_models_on_several_data_sets(clip_source: str, zepad, photos: str, tmp_path: Path) -> None:
    zepad.save_pretrained(tmp_path / "saved")
    (tmp_path / "again").symlink_to(photos)
    words = ["evaluate", clip_source, str(tmp_path / "saved"), "--data", f"{photos},{tmp_path / 'again'}", *SMALL]
    assert main([*words, "--threats", "clean", "--out", str(tmp_path / "out")]) == 0
    report = Report.load(tmp_path / "out")
    assert report.datasets == [Path(photos).name, "again"]
    assert {clip_source, str(tmp_path / "saved")} <= set(report.models)


def test_any_module_is_evaluated_in_python(photos: str) -> None:
    models = {"small": ConvNet(classes=2), "large": ConvNet(classes=2, width=16)}
    report = evaluate(models=models, tasks={"a": photos}, settings="smoke", threats="T2", n=4)
    assert report.models == ["small", "large"]
    assert report.threats == ["clean", "T2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embedded", "embedded"], "model: expected different ones"),
        (["embedded", "--eps", "1/255,2/255"], "several are for --suite"),
        (["embedded", "--suite", "clip12"], "did you mean 'clip13'"),
        (["embedded", "--suite", "clip13", "--norm", "l2"], "budgets of a suite are L-inf"),
        (["embedded", "--data", ","], "data set: expected different ones, got none"),
    ],
)
def test_bad_combinations_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_killed_suite_goes_on_at_its_commits(clip_source: str, tmp_path: Path) -> None:
    """Thirteen small sets on a local Hub; the run is killed after the second, and the sets change before it goes on."""
    out, words = tmp_path / "out", ["--preset", "smoke", "--n", "4", "--threats", "T2", "--eps", "2/255"]
    words = ["evaluate", clip_source, "--suite", "clip13", *words, "--out", str(out), "--resume", "--quiet"]
    tasks = SUITES.get("clip13").tasks
    with running_hub() as hub:
        for number, source in enumerate(tasks.values()):
            hub.put("datasets/" + source.removeprefix("wds:"), webdataset(("cat", "dog"), 8, 1, seed=number))
        variables = {**os.environ, **environment(hub, tmp_path / "cache")}
        variables["HF_DATASETS_CACHE"] = str(tmp_path / "datasets")
        done = [out / task / "2-255" / "report.json" for task in tasks]
        process = subprocess.Popen([sys.executable, "-m", "zepad_mm.cli", *words], env=variables)
        while not done[1].is_file():
            assert process.poll() is None, "the suite ended by itself"
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert not done[-1].is_file()
        (pair,) = done[0].parent.glob("*/*/report.json")
        before = pair.stat().st_mtime_ns
        for number, source in enumerate(tasks.values()):
            hub.put("datasets/" + source.removeprefix("wds:"), webdataset(("car", "bus"), 8, 1, seed=99 + number))
        with reached_through(hub, tmp_path / "cache"):
            assert main(words) == 0
    report = Report.load(out)
    assert pair.stat().st_mtime_ns == before
    assert report.datasets == list(tasks)
    assert {(row["threat"], round(255 * row["epsilon"])) for row in report.rows} == {("clean", 0), ("T2", 2)}
    plan = json.loads((out / "suite.json").read_text())
    for task, source in plan["tasks"].items():
        images = json.loads((out / "images" / f"{task}.json").read_text())
        assert images["source"] == source
        assert images["sha256"] == rows_digest(images["rows"])
        assert len(images["rows"]) == 4
    assert "Mean accuracy in % over 13 data sets" in (out / "report.md").read_text()


def test_suite_of_several_budgets(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        for file, data in webdataset(("cat", "dog"), 10, 1, seed=number).items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_bytes(data)
    suite = Suite(about="two folders", tasks={name: f"wds:{tmp_path / name}" for name in ("a", "b")}, preset="smoke")
    settings = replace(PRESETS.get("smoke"), threats=("T2",), n=5)
    models = {"small": ConvNet(classes=2), "large": ConvNet(classes=2, width=16)}
    report = evaluate_suite(models, suite, out=tmp_path / "out", settings=settings, budgets=[1 / 255, 8 / 255])
    assert len(report.rows) == len({json.dumps(row) for row in report.rows})
    means = {
        (mean["model"], mean["threat"], mean["epsilon"]): mean["accuracy"] for mean in report.meta["suite"]["means"]
    }
    assert set(means) == {(model, *at) for model in models for at in [("clean", 0), ("T2", 1 / 255), ("T2", 8 / 255)]}
    both = [report.accuracy("small", dataset=name) for name in ("a", "b")]
    assert means["small", "clean", 0] == pytest.approx(sum(both) / 2)
    with pytest.raises(ValueError, match="is of another run"):
        evaluate_suite(models, suite, out=tmp_path / "out", settings=replace(settings, n=4), resume=True)
