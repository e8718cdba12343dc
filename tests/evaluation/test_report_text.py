"""The first screen of a report: what holds against whom."""

from __future__ import annotations

from pathlib import Path

from zepad_mm.evaluation import Report
from zepad_mm.evaluation.report_text import first_screen, strongest_single
from zepad_mm.utils.text import percent

EARLIER = Path(__file__).parent / "earlier_model"


def test_first_screen_says_what_holds_against_whom() -> None:
    report = Report.load(EARLIER)
    sentences = first_screen(report)
    assert len(sentences) == 4
    budgets, screen = report.markdown().split("\n\n")[1:3]
    assert budgets.startswith("A budget such as 4/255 means")  # before the first budget
    assert screen == "- " + "\n- ".join(sentences)
    explained, _, tables = report.markdown().partition("## T1")
    for name in ("branch:", "baseline:equal", "@"):  # names are explained before the first table
        assert name in tables
        assert name in explained.partition("## Tables")[2]
    clean, public, white = sentences[:3]
    assert f"{percent(report.accuracy(report.default))} % (" in clean
    assert report.undefended is not None
    for model in (report.default, report.undefended):
        assert f"{percent(strongest_single(report, model, 'T1')['accuracy'])} %" in public
        assert f"{percent(report.accuracy(model, 'T2'))} %" in white
    assert ("likely overestimated" in sentences[3]) == report.doubted


def test_first_screen_of_a_report_without_attacks() -> None:
    report = Report.load(EARLIER)
    rows = [row for row in report.rows if row["threat"] == "clean" and row["model"] == "zepad"]
    sentences = first_screen(Report({**report.meta, "diagnostics": []}, rows))
    assert sentences[1:] == [
        "No attack from the public encoder was run.",
        "No white-box attack was run, so nothing here says what holds against one.",
        "No diagnostic was run, so stronger attacks may exist.",
    ]
