"""The words of reports and documents: their numbers are those of the table, and they claim no more than it."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.toy_defence import SETTINGS, defended, eval_data
from zepad_mm.evaluation import PRESETS, Records, Report, evaluate
from zepad_mm.evaluation.report_text import strongest_single, summary
from zepad_mm.evaluation.threats import T1, T2

ROOT = Path(__file__).parents[2]
QUICK = replace(
    SETTINGS,
    threats=("clean", "T1", "T1i", "T1ib", "T2"),
    n=64,
    n_white_box=40,
    n_transfer=24,
    universal=("feature_uap", "uapgd"),
    universal_steps={"feature_uap": 10, "uapgd": 2},
    rules=("rfdm",),
    steps=3,
    transfer=("mi", "di"),
    transfer_steps=3,
    epsilons_transfer=(4 / 255, 10 / 255),
    superclasses=(0, 0, 1),
    diagnostics_n=8,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("wording")
    return evaluate(defended(), data=eval_data(), settings=QUICK, out=out), out


def test_summary_says_worst_case_over_several_perturbations(finished: tuple[Report, Path]) -> None:
    report, _ = finished
    (line,) = [text for text in summary(report) if text.startswith("An attacker who knows only the public encoder (")]
    numbers = [float(number) for number in re.findall(r"(\d+\.\d) %", line)]
    worst = [report.accuracy(name, "T1") for name in ("zepad", "undefended")]
    single = [strongest_single(report, name, "T1")["accuracy"] for name in ("zepad", "undefended")]
    lost = report.row("zepad", "T1")["asr_correct"]
    assert numbers == [round(100 * value, 1) for value in (*worst, lost, *single)]
    assert "worst case per image over 2 perturbations" in line
    assert "one perturbation" not in line


def test_one_perturbation_is_called_one(finished: tuple[Report, Path]) -> None:
    report, _ = finished
    rows = [row for row in report.rows if not str(row["attack"]).startswith("uapgd")]
    (line,) = [text for text in summary(replace(report, rows=rows)) if "only the public encoder (" in text]
    assert "with one perturbation" in line
    assert "strongest single" not in line


def test_threat_models_take_the_first_images_and_say_so(finished: tuple[Report, Path]) -> None:
    report, out = finished
    for threat, n in (("clean", 64), ("T1", 64), ("T1i", 24), ("T1ib", 24), ("T2", 40)):
        assert {row["n"] for row in report.rows if row["threat"] == threat} == {n}
    text = report.markdown()
    assert "the first 40 images" in text
    assert "the first 24 images" in text
    records = Records.load(out)
    right = records.worst("zepad", "T2")
    assert len(right) == 40
    assert report.accuracy("zepad", "T2") == pytest.approx(float(right.float().mean()))
    sizes = [row["epsilon"] for row in report.rows if (row["model"], row["threat"]) == ("zepad", "T1i")]
    assert set(sizes) == {4 / 255, 10 / 255}
    # the headline is the largest budget, which counts what smaller ones break
    assert report.row("zepad", "T1i")["epsilon"] == 10 / 255
    assert report.accuracy("zepad", "T1i") <= report.row("zepad", "T1i", epsilon=4 / 255)["accuracy"]
    assert report.accuracy("undefended", "T1i") < report.accuracy("undefended") - 0.3
    assert report.accuracy("branch:robust_a", "T1ib") <= report.accuracy("branch:robust_a", "T1i")
    assert any(row["attack"] == "superclass@zepad" for row in report.rows)


def test_every_row_under_t2_has_a_verdict_and_its_strength(finished: tuple[Report, Path]) -> None:
    report, _ = finished
    for name in report.models:
        row = report.row(name, T2.key)
        assert row["verdict"] in ("held", "likely overestimated", "upper bound")
        assert row["strength"] == "reduced"
    assert "reduced attacks" in report.markdown()
    assert not PRESETS.get("smoke").full_strength()
    assert all(PRESETS.get(name).full_strength() for name in ("demo", "full"))
    assert PRESETS.get("apgd_ce_t").full_strength(fused=False)


def test_detection_has_the_false_alarms_paid_beside_the_nominal_ones(finished: tuple[Report, Path]) -> None:
    report, _ = finished
    for row in report.detection:
        assert {"tpr_at_fpr5", "fpr_at_fpr5", "tpr_at_real_fpr1", "tpr_at_real_fpr5"} <= set(row)
        if row["fpr_at_fpr5"] > 0.05:  # the real threshold is higher then
            assert row["tpr_at_real_fpr5"] <= row["tpr_at_fpr5"]
    assert "at a real 1 % / 5 %" in report.markdown()


@pytest.mark.parametrize("path", ["docs/shipped_model.md", "zepad_mm/assets/zepad/README.md"])
def test_documents_say_one_perturbation_only_of_one(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    if not (ROOT / "results" / "demo" / "report.json").is_file():
        pytest.skip("the shipped model is not measured yet: scripts/demo --out results/demo")
    report = Report.load(ROOT / "results" / "demo")
    for sentence in re.findall(r"[^.|]*one perturbation(?:[^.]|\.\d)*", text):
        shares = [float(number) for number in re.findall(r"\d+\.\d", sentence.split(";")[0])]
        known = [
            round(100 * row["accuracy"], 1)
            for name in report.models
            for row in (report.row(name), strongest_single(report, name, T1.key))
        ]
        assert all(share in known for share in shares), sentence


# what is called otherwise in a message, a help text or a page: one word for one thing
OTHER_WORDS = re.compile(r"\b(mpae|(detection|detector|anomaly) score|(clean|public|standard) branch)", re.IGNORECASE)


def test_texts_of_the_package_use_one_word_for_one_thing() -> None:
    """Branches are robust or benign, what the detector gives is a suspicion score."""
    found = []
    for path in (*(ROOT / "zepad_mm").rglob("*.py"), *(ROOT / "recipes").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
                found += [(path.name, match.group()) for match in OTHER_WORDS.finditer(node.value)]
    # files by an older version are told how to rename their roles
    assert [entry for entry in found if entry != ("config.py", "mpae")] == []
