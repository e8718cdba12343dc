"""The documentation is built without a warning, and its reference has every public name."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import zepad_mm
from tests.helpers.documents import ROOT

# packages whose public names are those of __all__, and modules whose public names are what they define
PACKAGES = ("attacks", "classifier", "data", "defences", "encoders", "evaluation", "pretraining", "serve", "training")
MODULES = ("defend", "pipelines", "selection", "utils.hub", "models.zepad", "models.onnx")
NO_REFERENCE = {"cli", "models", "utils"}  # commands have --help; of models and utils the modules above and below


def public_names(module: ModuleType) -> list[str]:
    """Names in ``__all__``, or the public classes and functions that a module defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    kinds = (inspect.isclass, inspect.isfunction)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and value.__class__ and any(kind(value) for kind in kinds)
        if value.__module__ == module.__name__
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    for extra in ("sphinx", "myst_parser", "furo", "lightly", "fastapi"):
        pytest.importorskip(extra)
    from sphinx.cmd.build import build_main

    out = tmp_path_factory.mktemp("site")
    words = ["-q", "-W", "--keep-going", "-d", str(out / "doctrees"), str(ROOT / "docs"), str(out / "html")]
    assert build_main(words) == 0
    return out / "html"


@pytest.mark.slow
def test_site_builds_without_warnings(site: Path) -> None:
    assert (site / "quickstart.html").is_file()


@pytest.mark.slow
def test_reference_has_every_public_name(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, uri: uri)
    documented = {name for kind, entries in inventory.items() if kind.startswith("py:") for name in entries}
    models = [f"models.{module.name}" for module in pkgutil.iter_modules([str(ROOT / "zepad_mm" / "models")])]
    missing = [
        f"{module.__name__}.{name}"
        for path in {*PACKAGES, *MODULES, *models}
        for module in (import_module(f"zepad_mm.{path}"),)
        for name in public_names(module)
        if f"{module.__name__}.{name}" not in documented
    ]
    assert not missing, f"add to a page of docs/api: {sorted(missing)}"
    assert all(f"{home}.{name}" in documented for name, home in zepad_mm._HOMES.items())


def test_every_package_is_in_the_reference() -> None:
    packages = {module.name for module in pkgutil.iter_modules(zepad_mm.__path__) if module.ispkg}
    assert packages - NO_REFERENCE == set(PACKAGES), "name the new package here and on a page of docs/api"
