"""The top level of the package."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import zepad_mm
from zepad_mm.models.config import BUILT_IN_HEADS
from zepad_mm.models.heads import HEADS
from zepad_mm.utils.io import ASSETS

EMBEDDED = ASSETS / "zepad"
ROOT = Path(__file__).parents[1]
DEMO = ROOT / "results" / "demo"
OF_EXTRAS = {  # modules of the package and the extra that their imports come with
    "pretraining/": "ssl",
    "serve/": "serve",
    "cli/serve.py": "serve",
    "models/onnx.py": "onnx",
    "training/tracking.py": "trackers",
}


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


def declared(requirements: list[str]) -> set[str]:
    """Names of distributions in requirements, as indices write them."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", text, maxsplit=1)[0]).lower() for text in requirements}


def imported(folder: Path) -> set[tuple[str, str]]:
    """(file, top-level module) of every absolute import, wherever it stands in the file."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
            found |= {(path.relative_to(folder).as_posix(), name.partition(".")[0]) for name in names}
    return {(file, name) for file, name in found if name not in (*sys.stdlib_module_names, "zepad_mm", "__future__")}


def test_every_imported_distribution_is_declared_with_a_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always, extras = project["dependencies"], project["optional-dependencies"]
    for text in always:
        assert ">=" in text, f"{text} has no lower bound"
    homes = packages_distributions()
    for file, name in sorted(imported(ROOT / "zepad_mm")):
        extra = next((extra for start, extra in OF_EXTRAS.items() if file.startswith(start)), None)
        there = declared(always) | (declared(extras[extra]) if extra else set())
        assert declared(homes.get(name, [name])) & there, f"{file} imports {name}, which pyproject.toml lacks"
