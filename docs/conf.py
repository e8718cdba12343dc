"""How Sphinx builds the documentation: python -m sphinx -W --keep-going docs outputs/docs."""

from __future__ import annotations

import re
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


def escape_bars(app: Sphinx, what: str, name: str, about: Any, options: Any, lines: list[str]) -> None:
    """``|x|`` is a length in a docstring, and a substitution to Sphinx; text between backticks stays."""
    for index, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        lines[index] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_files_beside_docs)
    app.connect("autodoc-process-docstring", escape_bars)
