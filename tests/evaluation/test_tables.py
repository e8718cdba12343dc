"""Tables over several reports: what is compared, what is bold, and each format."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from zepad_mm.cli import main
from zepad_mm.evaluation import Report
from zepad_mm.evaluation.metrics import wilson
from zepad_mm.evaluation.plots import budget_figure, budget_sweep
from zepad_mm.evaluation.tables import FORMATS, as_csv, as_json, as_latex, as_markdown, entries, latex
from zepad_mm.utils.text import interval_text

CORRECT = {
    "undefended": {"clean": 700, "T1": 200, "T2": 0},
    "zepad": {"clean": 720, "T1": 650, "T2": 500},
    "branch:a_b": {"clean": 710, "T1": 640, "T2": 380},
}


KINDS = {"undefended": "undefended", "zepad": "default"}


def row(model: str, threat: str, right: int, n: int = 1000, attack: str = "", **more: Any) -> dict[str, Any]:
    low, high = wilson(right, n)
    return {
        "model": model,
        "kind": KINDS.get(model, "rule" if model.startswith("zepad:") else "branch"),
        "attack": attack or ("none" if threat == "clean" else "worst"),
        "threat": threat,
        "epsilon": {"clean": 0.0, "T1": 10 / 255}.get(threat, 4 / 255),
        "norm": "linf",
        "dataset": "clothing",
        "n": n,
        "accuracy": right / n,
        "ci_low": low,
        "ci_high": high,
        "seconds": 1.5,
        **more,
    }


def report(
    correct: dict[str, dict[str, int]] = CORRECT, dataset: str = "clothing", seed: int = 0, failed: Sequence[str] = ()
) -> Report:
    rows = [
        row(model, threat, right, dataset=dataset)
        for model, threats in correct.items()
        for threat, right in threats.items()
    ]
    if "T2" in correct["zepad"]:  # a single attack next to a worst case has no column
        rows.append(row("zepad", "T2", 651, attack="pgd@zepad", dataset=dataset))
    meta = {"seed": seed, "wall_s": 61.4, "commit": "abc", "hardware": "a CPU", "warnings": []}
    meta["diagnostics"] = [{"name": name, "passed": False, "detail": "", "values": {}} for name in failed]
    return Report({**meta, "config": {"model": {"fusion": "rfdm"}}}, rows)


@pytest.fixture
def two() -> dict[str, Report]:
    """Two data sets; the second was attacked less, and a diagnostic of it failed."""
    few = {model: {"clean": threats["clean"], "T2": threats["T2"]} for model, threats in CORRECT.items()}
    return {"a": report(), "b": report(few, "flowers_50%", 3, ["gradients"])}


def test_as_markdown_shows_two_data_sets(two: dict[str, Report]) -> None:
    lines = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in as_markdown(entries(two)).split("\n\n")[0].split("\n")
    ]
    head, _, *body = lines
    wanted = ["data set", "seed", "n", "wall time", "model", "clean", "T1 worst, 10/255", "T2 worst, 4/255"]
    assert head == wanted
    assert [line[:2] for line in body] == [["clothing", "0"]] * 3 + [["flowers_50% (!)", "3"]] * 3
    assert body[1][2:5] == ["1000", "61 s", "`zepad`"]
    cells = dict(zip(head, body[1], strict=True))
    assert cells["clean"] == interval_text(0.72, *wilson(720, 1000))
    assert cells["T2 worst, 4/255"] == f"**{interval_text(0.5, *wilson(500, 1000))}**"
    assert dict(zip(head, body[3], strict=True))["T1 worst, 10/255"] == "-"
    text = as_markdown(entries(two))
    assert "(!): likely overestimated" in text
    assert "<=: not attacked" not in text


def test_columns_are_ordered_from_weak_to_strong() -> None:
    strong = {"zepad": {"clean": 7, "T2": 1}}
    weak = {"zepad": {"clean": 7, "T1": 3}}
    head = as_markdown(entries({"a": report(strong), "b": report(weak, "flowers")})).split("\n")[0]
    assert head.index("T1 worst") < head.index("T2 worst")


def test_reports_on_the_same_data_are_named() -> None:
    found = entries({"first": report(), "second": report()})
    assert as_markdown(found).startswith("| report ")
    assert {entry.best for entry in found if entry.threat == "T2" and entry.model == "zepad"} == {True}
    assert not as_markdown(entries({"first": report(), "second": report(seed=1)})).startswith("| report ")


@pytest.mark.parametrize(
    ("right", "more", "bold"),
    [
        ({"a": 500, "b": 380}, {}, ["a"]),
        ({"a": 500, "b": 480}, {}, []),  # the intervals overlap
        ({"a": 500, "b": 500}, {}, []),
        ({"a": 500, "b": 380, "c": 490}, {}, []),  # the second best decides, wherever it is
        ({"a": 500}, {}, []),  # no other model
        ({"a": 500, "b": 380}, {"a": {"upper_bound": True}}, []),  # may be lower
        ({"a": 500, "b": 380}, {"b": {"upper_bound": True}}, ["a"]),
        ({"a": 500, "b": 380}, {"b": {"dataset": "flowers"}}, []),  # other images
        ({"a": 500, "b": 380}, {"b": {"epsilon": 1 / 255}}, []),  # another budget
    ],
)
def test_bold_needs_separate_intervals(right: dict[str, int], more: dict[str, dict[str, Any]], bold: list[str]) -> None:
    rows = [row(model, "T2", count, **more.get(model, {})) for model, count in right.items()]
    found = entries({"r": Report(report().meta, rows)})
    assert [entry.model for entry in found if entry.best] == bold
    for entry in found:  # the same, from the definition
        rivals = [o for o in found if o is not entry and (o.dataset, o.epsilon) == (entry.dataset, entry.epsilon)]
        separate = all(entry.ci_low > rival.ci_high for rival in rivals) and bool(rivals)
        assert entry.best == (separate and not entry.upper_bound)
    assert as_markdown(found).count("**") == 2 * len(bold)
    assert as_latex(found).count(r"\textbf{") == len(bold)


def test_entries_drop_the_row_of_the_rule_that_ships() -> None:
    echo = {**CORRECT, "zepad:rfdm": CORRECT["zepad"]}
    found = entries({"r": report(echo)})
    assert {entry.model for entry in found} == set(CORRECT)
    assert any(entry.best for entry in found)
    differs = {**CORRECT, "zepad:rfdm": {**CORRECT["zepad"], "T2": 499}}  # other parameters: another model
    assert "zepad:rfdm" in {entry.model for entry in entries({"r": report(differs)})}


def test_attacks_without_a_worst_case_have_a_column_each() -> None:
    rows = [row(model, "T1", 400, n, attack) for model in ("a", "b") for attack, n in (("uap", 1000), ("ssp", 500))]
    rows.append(row("a", "T1", 600, attack="random_noise", control=True))
    text = as_markdown(entries({"r": Report(report().meta, rows)}))
    assert "T1 uap, 10/255" in text
    assert "T1 ssp, 10/255" in text
    assert "random_noise" not in text
    assert text.count(", n = 500") == 2  # fewer images than the line says


def test_csv_and_json_hold_every_entry(two: dict[str, Report]) -> None:
    found = entries(two)
    assert json.loads(as_json(found)) == [asdict(entry) for entry in found]
    lines = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert len(lines) == len(found) == 15
    for line, entry in zip(lines, found, strict=True):
        for key, value in asdict(entry).items():
            kind = {bool: lambda text: text == "True"}.get(type(value), type(value))
            assert kind(line[key]) == value, key


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("gen_af & 5 % #1 $x$ {a}", r"gen\_af \& 5 \% \#1 \$x\$ \{a\}"),
        ("a\\b~c^d", r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"),
        ("<= 5 < 6 > 4", r"$\leq$ 5 \textless{} 6 \textgreater{} 4"),
        ("plain (1.0-2.0)", "plain (1.0-2.0)"),
    ],
)
def test_latex_escapes_special_characters(text: str, escaped: str) -> None:
    assert latex(text) == escaped


def test_as_latex_is_complete(two: dict[str, Report]) -> None:
    text = as_latex(entries(two))
    assert "branch:a\\_b" in text
    assert "flowers\\_50\\% (!)" in text
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    columns = re.search(r"\\begin\{tabular\}\{(l+)\}", text)
    assert columns
    lines = [line for line in body.strip().split("\n") if "rule" not in line]
    assert len(lines) == 7
    for line in lines:
        assert line.endswith(r" \\")
        assert len(re.findall(r"(?<!\\)&", line)) == len(columns.group(1)) - 1
    assert body.count(r"\midrule") == 2  # below the head, and between the data sets
    assert not re.search(r"(?<!\\)[_#]", text.split("\n", 1)[1])
    assert text.count("{") == text.count("}")


def test_entries_reject_incomplete_reports() -> None:
    with pytest.raises(ValueError, match="at least one report"):
        entries({})
    with pytest.raises(ValueError, match="r: the report holds no rows"):
        entries({"r": Report({}, [])})
    for lost in ("ci_low", "dataset", "model"):
        rows = [{key: value for key, value in row("a", "T2", 5).items() if key != lost}]
        with pytest.raises(ValueError, match=f"r: the report lacks '{lost}'; expected report.json"):
            entries({"r": Report(report().meta, rows)})
    with pytest.raises(ValueError, match="lacks 'seed'"):
        entries({"r": Report({"warnings": []}, [row("a", "T2", 5)])})
    for name in FORMATS:
        if name in ("md", "latex"):
            with pytest.raises(ValueError, match="at least one entry"):
                FORMATS.get(name)([])


@pytest.fixture
def folders(two: dict[str, Report], tmp_path: Path) -> list[str]:
    for name, one in two.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(one.to_dict()))
    return [str(tmp_path / name) for name in two]


@pytest.mark.parametrize("name", FORMATS)
def test_report_command_writes_every_format(
    name: str, folders: list[str], two: dict[str, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *folders, "--format", name]) == 0
    printed = capsys.readouterr().out
    assert printed == FORMATS.get(name)(entries(dict(zip(folders, two.values(), strict=True))))
    out = tmp_path / "tables" / "table"
    assert main(["report", f"{folders[0]}/report.json", folders[1], "--format", name, "--out", str(out)]) == 0
    assert out.read_text() == printed
    assert capsys.readouterr().out == f"Written: {out}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "reports"),
        (["report", "missing"], "missing does not exist; expected the report of an evaluation"),
        (["report", "{a}", "--format", "tex"], "unknown table format 'tex'"),
        (["report", "{a}", "{a}/report.json"], "is given twice"),
        (["report", "{a}", "--out", "{a}"], "Is a directory"),
        (["report", "{a}", "--out", "{a}/report.json/x"], "exists"),
        (["report", __file__], "is not a complete JSON file"),
    ],
)
def test_report_command_errors_are_one_line(
    words: list[str], message: str, folders: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(a=folders[0]) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("zepad: ")
    assert message in said.err
    assert said.err.count("\n") == 1


def test_budget_figure_shows_the_sweep() -> None:
    found = report()
    assert budget_sweep(found) == {}
    with pytest.raises(ValueError, match="diagnostics_n of at least 1"):
        budget_figure(found)
    found.meta["config"]["evaluation"] = {"diagnostics_n": 40}
    values = {"8/255": 0.25, "4/255": 0.5, "64/255": 0.0}
    found.meta["diagnostics"] = [
        {"name": "finite", "passed": True, "values": {}},
        {"name": "budget_sweep", "passed": True, "values": values},
    ]
    (panel,) = budget_figure(found).axes
    line = panel.get_lines()[0]
    assert list(line.get_xdata()) == [0, 4, 8, 64]
    assert list(line.get_ydata()) == [72, 50, 25, 0]
    (bars,) = panel.collections
    spans = [[float(y) / 100 for _, y in segment] for segment in bars.get_segments()]
    for span, (count, n) in zip(spans, ((720, 1000), (20, 40), (10, 40), (0, 40)), strict=True):
        assert span == pytest.approx(wilson(count, n), abs=1e-6)
