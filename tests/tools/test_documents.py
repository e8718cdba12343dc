"""The documents: their code runs and prints what they say, their commands exist, their numbers are those of records."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
from copy import deepcopy
from pathlib import Path

import pytest

from tests.helpers.browser import SIZES
from tests.helpers.documents import DOCUMENTS, ROOT, blocks, commands, name_of
from tools import screenshots, threat_figures, tutorials
from tools.front_page import GATE, TRANSFER, GateRecord, with_transfer
from tools.readme_picture import RECORD, caption, fingerprint
from tools.threat_figures import caption as caption_of
from zepad_mm.attacks import ATTACKS
from zepad_mm.cli import _parser
from zepad_mm.defences import DEFENCES
from zepad_mm.encoders import BACKENDS
from zepad_mm.models.fusion import RULES
from zepad_mm.utils.io import read_json
from zepad_mm.utils.text import percent

# first words of a command -> the test that runs it, at a small size, or why none does
RUN_BY = {
    "zepad classify": "tests/cli/test_cli.py::test_example_of_the_help_runs",
    "zepad attack": "tests/cli/test_cli.py::test_example_of_the_help_runs",
    "zepad defend": "tests/test_defend.py::test_zepad_defend_takes_a_folder_of_photos",
    "zepad evaluate": "tests/cli/test_evaluate_models.py::test_several_models_on_several_data_sets",
    "zepad report": "tests/cli/test_cli.py::test_example_of_the_help_runs",
    "zepad card": "tests/cli/test_cli.py::test_example_of_the_help_runs",
    "zepad doctor": "tests/cli/test_cli.py::test_example_of_the_help_runs",
    "zepad push": "tests/cli/test_cli.py::test_example_of_push_runs",
    "zepad serve": "tests/cli/test_cli.py::test_example_of_serve_runs",
    "scripts/demo": "tests/evaluation/test_regression.py::test_demo_writes_report_and_plots",
    "scripts/test": "is what runs the tests",
    "python recipes/": "tests/recipes/test_recipes.py::test_recipe_runs_its_smoke_config",
    "python -m tools.render_docs": "tests/tools/test_documents.py::test_documents_match_the_records",
    "python -m sphinx": "tests/tools/test_documentation_site.py::test_site_builds_without_warnings",
    "curl": "tests/serve/test_serve.py::test_classify_matches_the_classifier",
    "git clone": "needs a network",
    "cd ": "of a shell",
    "python3 -m venv": "scripts/_venv.sh does it for scripts/test",
    ". .venv/bin/activate": "of a shell",
    "pip install examples/plugin": "tests/utils/test_registry.py::test_example_plugin_installs",
    "pip wheel": "fetches the build backend from a package index",
    "pip install": "scripts/_venv.sh does it for scripts/test; another index needs a network",
    ".venv/bin/pip install": "scripts/_venv.sh does it for scripts/test",
    ".venv/bin/pre-commit install": "changes the checkout",
    "hf auth login": "needs an account",
}


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path, "python")], ids=name_of)
def test_python_of_documents_prints_what_it_says(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a page in turn; ``print(...)  # text`` prints a line that begins with the text."""
    monkeypatch.chdir(tmp_path)
    for registry in (ATTACKS, DEFENCES, RULES, BACKENDS):  # what a page registers is gone after it
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    code = "\n".join(blocks(document, "python"))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, str(document), "exec"), {"__name__": "__main__"})
    expected = re.findall(r"^ *print\(.*\)  # (.+)$", code, re.M)
    lines = said.getvalue().splitlines()
    assert len(lines) >= len(expected)
    for line, text in zip(lines, expected, strict=False):
        assert line.startswith(text), (line, text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_of_documents_are_accepted_and_run_by_a_test(document: Path) -> None:
    for command in commands(document):
        known = [test for words, test in RUN_BY.items() if command.startswith(words)]
        assert known, f"{command}: run it in a test and name the test in RUN_BY"
        if "::" in known[0]:
            path, name = known[0].split("::")
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), known[0]
        words = shlex.split(command)
        if words[0] == "zepad":
            _parser().parse_args(words[1:])
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), command
        elif words[0].startswith("scripts/") or words[0] == "python":
            for word in words:
                assert not re.match(r"(scripts|recipes|tools)/", word) or (ROOT / word).exists(), word


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:recipes|scripts|zepad_mm|docs|tools|results|reproduction)/[\w./]*)`", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (document.parent / link).exists(), link


def test_documents_match_the_records() -> None:
    from tools.render_docs import stale_documents

    assert stale_documents() == []


def test_picture_is_of_the_shipped_model() -> None:
    record = read_json(RECORD)
    remedy = "another model ships: python -m tools.readme_picture && python -m tools.render_docs"
    assert record["fingerprint"] == fingerprint(), remedy
    right = sum(row["attacked"]["defended"]["right"] for row in record["photos"])
    assert f"defended {right};" in caption(record).partition("after it")[2]


def test_threat_figures_are_of_the_shipped_model() -> None:
    """Within the budget of each threat model, small, and captions that hold for any answers."""
    record = read_json(threat_figures.RECORD)
    remedy = "another model ships: python -m tools.threat_figures && python -m tools.render_docs"
    assert record["fingerprint"] == fingerprint(), remedy
    for attacker in threat_figures.ATTACKERS:
        found = record["threats"][attacker.threat.key]
        assert found["epsilon"] == threat_figures.epsilon_of(attacker.threat)
        assert found["change"] <= found["epsilon"] + 1e-6
        assert (threat_figures.FIGURES / f"{attacker.threat.key}.png").stat().st_size < 80_000
    changed = deepcopy(record)
    rows = list(changed["threats"]["T2"]["photos"].values())
    for count, flagged in enumerate((False, True)):
        for row in rows:
            row["flagged"] = flagged
        assert ("None of those of T2 is flagged" in caption_of(changed, "T3")) is not flagged
        assert caption_of(changed, "T2").endswith(f"flagged: {count * len(rows)}.")


def test_tutorials_show_what_their_code_gave_with_the_shipped_model() -> None:
    assert tutorials.stale_pages() == [], "python -m tools.tutorials"
    for page in tutorials.PAGES:
        assert tutorials.shown(page)
        for name in tutorials.shown(page):
            assert (tutorials.PICTURES / name).stat().st_size < tutorials.LARGEST
    assert tutorials.with_outputs("```python\na\n```\nb\n", ["c"]) == "```python\na\n```\n\n```text\nc\n```\nb\n"


def test_screenshots_are_of_the_shipped_model() -> None:
    record = read_json(screenshots.RECORD)
    assert record["fingerprint"] == fingerprint(), "another model ships: python -m tools.screenshots"
    assert record["pictures"] == sorted(f"{size}-{theme}.png" for size in SIZES for theme in screenshots.THEMES)
    for name in record["pictures"]:
        assert (screenshots.PICTURES / name).stat().st_size < screenshots.LARGEST


def test_front_page_words_follow_the_record() -> None:
    """The sentences hold for the committed record, and for one in which the defence withstands some attacks."""
    config = read_json(ROOT / "zepad_mm" / "assets" / "zepad" / "config.json")
    record = with_transfer(read_json(GATE), read_json(TRANSFER))
    study = GateRecord(record, config)
    assert len(study.rows("T1i")) == len(record["sets"])
    assert "T1i on" not in study.source()
    assert "T1i on clothing" in GateRecord(read_json(GATE), config).source()
    assert f"{percent(study.accuracy('zero_sacrifice', 'T1'))} " in study.table()
    assert " 2.1x |" in GateRecord(record, config, 2.1).table()
    changed = json.loads(json.dumps(deepcopy(record)))
    rows = [row for one in changed["sets"].values() for row in one["rows"] if row["threat"] == "T2"]
    for row in rows:
        row["right"][-1] = 0
    assert "succeeds on every image" in GateRecord(changed, config).white_box()
    rows[-1]["right"][-1] = 7
    assert "succeeds on every image" not in GateRecord(changed, config).white_box()
    assert " 7 after it" in GateRecord(changed, config).white_box()
    for row in rows:
        row["cap"] = 0.123
    assert "not measured" in GateRecord(changed, config).white_box()
    with pytest.raises(ValueError, match=r"results/gate.json has no cap 0.123"):
        GateRecord(record, {**config, "policy_caps": {"zero_sacrifice": 0.123, "white_box": 0.0}}).table()
    changed["meta"]["config"]["gates"]["shipped"]["threshold"] = 0.123
    with pytest.raises(ValueError, match="one gate"):
        with_transfer(changed, read_json(TRANSFER))
