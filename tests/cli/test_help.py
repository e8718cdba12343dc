"""Help texts: printed without heavy imports, with options generated from the settings they set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.test_tables import report
from zepad_mm import __version__
from zepad_mm.cli import COMMANDS
from zepad_mm.cli.defend import DEFEND_OPTIONS, TRAIN_FIELDS
from zepad_mm.cli.serve import SERVE_OPTIONS
from zepad_mm.cli.settings_options import settings_fields
from zepad_mm.defend import DefendSettings
from zepad_mm.serve import ServeSettings
from zepad_mm.training import TrainSettings


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from zepad_mm.cli import COMMANDS, main\n"
        "helps = [[name, '--help'] for name in COMMANDS]\n"
        "for words in (['--help'], ['--version'], *helps, ['nonsense'], []):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'datasets', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    text = " ".join(done.stdout.split())
    for word in (*COMMANDS, "--threats", "(default: fare)", "(default: 700)", __version__):
        assert word in text


def test_report_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report().to_dict()))
    code = (
        "import sys\n"
        "from zepad_mm.cli import main\n"
        f"assert main(['report', {str(tmp_path)!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'open_clip', 'datasets', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


@pytest.mark.parametrize(
    ("location", "options", "settings"),
    [
        (DEFEND_OPTIONS.location, DEFEND_OPTIONS.fields, DefendSettings),
        ("training/settings.py:TrainSettings", TRAIN_FIELDS, TrainSettings),
        (SERVE_OPTIONS.location, SERVE_OPTIONS.fields, ServeSettings),
    ],
)
def test_settings_options_name_fields_of_the_settings(
    location: str, options: dict[str, str], settings: type[object]
) -> None:
    assert set(settings_fields(location)) == set(settings.__dataclass_fields__)  # type: ignore[attr-defined]
    assert set(options.values()) <= set(settings_fields(location))
