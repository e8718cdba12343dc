"""Command-line options generated from the fields of settings dataclasses.

Types, defaults and help texts (the comment behind each field) are read from the source of the class, because importing
the modules that define the settings would load torch before ``--help`` is printed.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import zepad_mm
from zepad_mm.cli.common import budget, split_commas

PACKAGE = Path(zepad_mm.__file__).parent


@dataclass(frozen=True)
class SettingsField:
    """A field of a settings dataclass: annotation, default and comment as they stand in the source."""

    annotation: str
    default: ast.expr | None
    comment: str

    @property
    def kind(self) -> type:
        """The type that the command line parses: int, float or str."""
        return {"int": int, "float": float}.get(self.annotation.removesuffix(" | None"), str)


@dataclass(frozen=True)
class SettingsOptions:
    """Options of a command that set fields of one settings class; an option that is not given leaves its field.

    Attributes:
        location: file of the package and class, e.g. ``"training/settings.py:TrainSettings"``.
        fields: option to field, e.g. ``{"--n": "n_train"}``; ``--no-NAME`` switches a boolean field off.
        defaults: expression that constructs the settings, where its keywords replace the defaults of the class.
    """

    location: str
    fields: Mapping[str, str]
    defaults: ast.expr | None = None

    def declare(self, parser: Any) -> None:
        """Add the options to a jsonargparse parser."""
        known = settings_fields(self.location)
        calls = [node for node in ast.walk(self.defaults) if isinstance(node, ast.Call)] if self.defaults else []
        overrides = {keyword.arg: keyword.value for call in calls for keyword in call.keywords}
        for option, name in self.fields.items():
            field = known[name]
            if field.annotation == "bool":
                parser.add_argument(option, action="store_true", help=field.comment.removeprefix("False: "))
            else:
                default = _default_text(overrides.get(name, field.default))
                kind = str if option == "--eps" else field.kind  # 4/255 is parsed by budget()
                parser.add_argument(
                    option, type=kind, default=argparse.SUPPRESS, help=f"{field.comment or name}{default}"
                )

    def given(self, options: Any) -> dict[str, Any]:
        """Field name to value of the options that were given, for ``dataclasses.replace``."""
        known = settings_fields(self.location)
        given: dict[str, Any] = {}
        for option, name in self.fields.items():
            value = getattr(options, option.removeprefix("--").replace("-", "_"), None)
            if value is None or value is False:
                continue
            if known[name].annotation == "bool":
                given[name] = not option.startswith("--no-")
            elif option == "--eps":
                given[name] = budget(value)
            elif known[name].annotation.startswith("tuple"):
                given[name] = tuple(split_commas(value))
            else:
                given[name] = value
        return given


@cache
def settings_fields(location: str) -> Mapping[str, SettingsField]:
    """Fields of a settings class by name; ``location`` as for :class:`SettingsOptions`."""
    file, _, class_name = location.partition(":")
    source = (PACKAGE / file).read_text()
    lines = source.splitlines()
    settings = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == class_name)
    fields = {}
    for node in settings.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            ends = (node.lineno, node.end_lineno or node.lineno)
            comments = [lines[number - 1].partition("  # ")[2] for number in ends]
            comment = next(filter(None, comments), "")
            fields[node.target.id] = SettingsField(ast.unparse(node.annotation), node.value, comment)
    return fields


def _default_text(default: ast.expr | None) -> str:
    """The default as it is typed: 4/255 for ``4 / 255`` and a,b for ``("a", "b")``; nothing for None."""
    if default is None or (isinstance(default, ast.Constant) and default.value is None):
        return ""
    text = ast.unparse(default)
    for source, typed in (("'", ""), (",)", ""), (", ", ","), (" / ", "/"), ("(", ""), (")", "")):
        text = text.replace(source, typed)
    return f" (default: {text})" if text else ""
