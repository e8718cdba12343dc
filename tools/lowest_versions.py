#!/usr/bin/env python
"""Write the record of the quick tests at the lowest versions that pyproject.toml declares.

    tools/test_lowest_versions

runs it in its own environment, with pytest's report: ``python -m tools.lowest_versions --junit FILE``.
"""

from __future__ import annotations

import argparse
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import LIBRARIES, origin

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "results" / "lowest_versions.json"
EXTRA = "dev"  # what the tests need; it names other extras
MARKS = ("<!-- lowest versions: written by tools/render_docs.py -->", "<!-- /lowest versions -->")


def floors(extra: str = EXTRA) -> dict[str, str]:
    """Package to lowest version, of the dependencies and of an extra with those that it names.

    Raises ValueError for a dependency without a lower bound.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    left = [*project["dependencies"], *project["optional-dependencies"][extra]]
    while left:
        requirement = Requirement(left.pop(0))
        name = canonicalize_name(requirement.name)
        if name == project["name"]:
            left += [line for named in sorted(requirement.extras) for line in project["optional-dependencies"][named]]
            continue
        lowest = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==")]
        if len(lowest) != 1 or found.get(name, lowest[0]) != lowest[0]:
            raise ValueError(
                f"pyproject.toml: expected one lower bound for {name}, got {requirement}; write {name}>=1.2"
            )
        found[name] = lowest[0]
    return dict(sorted(found.items()))


def counts(junit: Path) -> dict[str, int]:
    """Passed, failed (errors too) and skipped tests of a JUnit report."""
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
        for key in total:
            total[key] += int(suite.get(key, 0))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


def failures(junit: Path) -> list[str]:
    """The tests that failed in a JUnit report, as pytest takes them."""
    cases = ElementTree.parse(junit).getroot().iter("testcase")
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return [f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}" for case in failed]


def record(junit: Path, again: Path | None = None) -> dict[str, Any]:
    """What ran where, with the installed version of each declared package.

    Args:
        junit: report of all tests.
        again: report of those that failed, run once more and alone; None or no file: not run again.
    """
    about = origin()
    installed = {name: version(name) for name in floors()}
    about["versions"] = {"python": about["versions"]["python"], **installed}
    found: dict[str, Any] = {
        "meta": {**about, "config": {"tests": "not slow", "extra": EXTRA}},
        **counts(junit),
        "passed_alone": [],
    }
    if again is not None and again.is_file():
        alone = counts(again)
        found |= {"passed": found["passed"] + alone["passed"], "failed": alone["failed"]}
        found["passed_alone"] = sorted(set(failures(junit)) - set(failures(again)))
    return found


def sentence(found: dict[str, Any]) -> str:
    """What users learn from the record."""
    versions = found["meta"]["versions"]
    named = [f"{name} {versions[name]}" for name in LIBRARIES]
    outcome = f"{found['passed']} pass"
    if found["passed_alone"]:
        outcome += f" ({len(found['passed_alone'])} of them only when run again alone)"
    if found["failed"]:
        outcome += f", {found['failed']} fail"
    return (
        "The lowest versions that `pyproject.toml` allows are those at which the quick tests were run: "
        f"{', '.join(named)}, and the others in `results/lowest_versions.json`, on Python {versions['python']}. There "
        f"{outcome} and {found['skipped']} are skipped."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, required=True, help="report of pytest --junitxml")
    parser.add_argument("--again", type=Path, help="report of the tests that failed, run again alone")
    parser.add_argument("--failed", action="store_true", help="only list the tests that failed")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    if args.failed:
        for test in failures(args.junit):
            print(test)
        return
    write_json(args.out, record(args.junit, args.again))
    print(args.out)


if __name__ == "__main__":
    main()
