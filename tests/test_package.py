"""The top level of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zepad_mm
from zepad_mm.models.config import BUILT_IN_HEADS
from zepad_mm.models.heads import HEADS
from zepad_mm.utils.io import ASSETS

EMBEDDED = ASSETS / "zepad"
DEMO = Path(__file__).parents[1] / "results" / "demo"


def test_top_level_import_is_lazy() -> None:
    code = (
        "import sys, zepad_mm; "
        "heavy = {'torch', 'transformers', 'open_clip', 'timm', 'datasets', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy; assert zepad_mm.__version__; assert 'ZePAD' in dir(zepad_mm)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for name in zepad_mm.__all__:
        assert getattr(zepad_mm, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        zepad_mm.Zepad  # noqa: B018


RUN = """
import sys
from zepad_mm.cli import main
for words in (["card", sys.argv[1]], ["report", sys.argv[2]], ["classify", "nowhere.png", "--labels", "a"], ["--help"]):
    try:
        print(main(words))
    except SystemExit:
        pass
    heavy = {"torch", "transformers", "datasets"} & set(sys.modules)
    assert not heavy, (words, heavy)
"""


def test_commands_that_need_no_model_import_no_torch(tmp_path: Path) -> None:
    """Work on files alone, and help: importing torch alone takes longer than they do."""
    shutil.copytree(EMBEDDED, tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()
    words = [str(tmp_path / "model"), str(DEMO)]
    subprocess.run([sys.executable, "-c", RUN, *words], check=True, capture_output=True, timeout=60)
    assert "Not evaluated yet" in (tmp_path / "model" / "README.md").read_text()
    assert set(HEADS) == set(BUILT_IN_HEADS)
