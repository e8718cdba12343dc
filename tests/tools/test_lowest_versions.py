"""The lower bounds of pyproject.toml are those at which the quick tests ran."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from tools import lowest_versions
from tools.lowest_versions import RECORD, counts, failures, floors, sentence
from zepad_mm.utils.io import read_json

EXTRAS = tomllib.loads((lowest_versions.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]


@pytest.mark.parametrize("extra", list(EXTRAS))
def test_lower_bounds_are_those_that_were_run(extra: str) -> None:
    """Of an extra that the tests do not install, the packages that others declare, too."""
    ran = {name: Version(text) for name, text in read_json(RECORD)["meta"]["versions"].items()}
    declared = {name: Version(text) for name, text in floors(extra).items()}
    remedy = "a bound was changed: tools/test_lowest_versions && python -m tools.render_docs"
    assert {name: ran[name] for name in declared.keys() & ran.keys()} == {
        name: bound for name, bound in declared.items() if name in ran
    }, remedy
    if extra == lowest_versions.EXTRA:
        assert ran.keys() - {"python"} == declared.keys(), remedy


def test_quick_tests_passed_at_the_lowest_versions() -> None:
    record = read_json(RECORD)
    assert record["failed"] == 0
    assert record["passed"] > 1000
    assert "fail" not in sentence(record)
    changed = sentence({**record, "failed": 2, "passed_alone": ["a", "b", "c"]})
    assert "pass (3 of them only when run again alone), 2 fail and" in changed


def test_report_counts_errors_as_failures_and_names_them(tmp_path: Path) -> None:
    case = '<testcase classname="tests.utils.test_hub" name="test_a[b.c]">{}</testcase>'
    text = case.format("<failure/>") + case.format("") + case.format("<skipped/>")
    report = tmp_path / "junit.xml"
    report.write_text(
        f'<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3">{text}</testsuite></testsuites>'
    )
    assert counts(report) == {"passed": 3, "failed": 3, "skipped": 3}
    assert failures(report) == ["tests/utils/test_hub.py::test_a[b.c]"]


@pytest.mark.parametrize(("line", "got"), [("six", "got six"), ("six>=1,>=2", "got six"), ("torch>=9", "for torch")])
def test_package_without_one_lower_bound_is_named(
    line: str, got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = f'[project]\nname = "zepad-mm"\ndependencies = ["torch>=2"]\noptional-dependencies.dev = ["{line}"]\n'
    (tmp_path / "pyproject.toml").write_text(project)
    monkeypatch.setattr(lowest_versions, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=got):
        floors()
