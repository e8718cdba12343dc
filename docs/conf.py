"""How Sphinx builds the documentation: python -m sphinx -W --keep-going docs outputs/docs."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx

from zepad_mm import __version__

project = "zepad-mm"
author = "zepad-mm maintainers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"zepad-mm {__version__}"
html_show_copyright = False

myst_heading_anchors = 3
autodoc_typehints = "none"  # signatures stay short; docstrings give shapes and units
autodoc_member_order = "groupwise"
autodoc_default_options = {"members": True, "undoc-members": True, "no-value": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def link_files_beside_docs(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to files outside of docs/ work where the repository is browsed; in the site they are downloads."""
    source[0] = re.sub(r"(?<!!)(\[[^\]]*\]\()\.\./", r"\1path:../", source[0])


def public_names(module: ModuleType) -> list[str]:
    """Names in ``__all__``, or the classes and functions that a module defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        if value.__module__ == module.__name__
    ]


def list_public_names(app: Sphinx, name: str, source: list[str]) -> None:
    """A directive for each public name after its module: autodoc alone finds neither lazy names nor constants."""

    def directives(match: re.Match[str]) -> str:
        module = import_module(match[1])
        lines = [match[0], "   :no-members:", ""]
        for each in public_names(module):
            value = getattr(module, each)
            kind = "class" if inspect.isclass(value) else "function" if inspect.isroutine(value) else "data"
            lines += [f".. auto{kind}:: {module.__name__}.{each}", ""]
        return "\n".join(lines)

    if name.startswith("api/"):
        source[0] = re.sub(r"^\.\. automodule:: ([\w.]+)$", directives, source[0], flags=re.M)


def escape_bars(app: Sphinx, what: str, name: str, about: Any, options: Any, lines: list[str]) -> None:
    """``|x|`` is a length in a docstring, and a substitution to Sphinx; text between backticks stays.

    A constant has the docstring of its type, which says nothing about it, and which is dropped.
    """
    if what == "data":
        lines.clear()
    for index, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        lines[index] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_files_beside_docs)
    app.connect("source-read", list_public_names)
    app.connect("autodoc-process-docstring", escape_bars)
