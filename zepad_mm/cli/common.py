"""What the commands share: how one is declared, and how what people type is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = '"embedded", a folder, or a name on the Hub'
DATA = '"embedded", a folder, or a name on the Hub'
SOURCE = "a source, e.g. open_clip:embedded, open_clip:ViT-B-32/openai or hf:openai/clip-vit-base-patch32"


class UsageError(Exception):
    """Something in the command line that cannot be meant."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of ``zepad``.

    Attributes:
        about: what it does, in a sentence.
        example: a command line that works, shown by ``--help`` and run by a test.
        declare: adds its arguments to a jsonargparse parser.
        run: does it; returns the exit code.
        json: whether it takes ``--json``, for scripts.
    """

    about: str
    example: str
    declare: Callable[[Any], None]
    run: Callable[[Any], int]
    json: bool = True

    def parser(self) -> Any:
        """The parser of its arguments."""
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(description=f"{self.about}\n\nexample:\n  {self.example}", exit_on_error=False)
        self.declare(parser)
        if self.json:
            parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument("--quiet", action="store_true", help="no progress")
        return parser


def told(options: Any, values: Any, text: str) -> None:
    """Print the outcome: JSON for scripts, or words."""
    print(json.dumps(values) if options.json else text)


def budget(text: str, norm: str = "linf") -> float:
    """A budget in pixels of [0, 1]: "4/255" or "0.0157"; in L2 any length. Raises ValueError for "8" in L-inf."""
    top, slash, bottom = str(text).partition("/")
    try:
        value = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--eps: expected a budget such as 4/255 or 0.0157, got {text!r}") from None
    if not 0 < value <= (1 if norm == "linf" else float("inf")):
        raise ValueError(f"--eps: expected a budget above 0 and at most 1, in pixels of [0, 1], got {text!r}; 8/255?")
    return value


def listed(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def labels_of(text: str) -> list[str]:
    """Labels between commas. Raises UsageError when there are none."""
    labels = listed(text)
    if not labels:
        raise UsageError('--labels: expected names separated by commas, e.g. --labels "a cat,a dog"')
    return labels


def written(out: str | Path, *names: str) -> list[str]:
    """Paths of files in a folder, for messages and JSON."""
    return [str(Path(out) / name) for name in names]
