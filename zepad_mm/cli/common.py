"""Declaration of commands, parsing of their option values, and printing of their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from zepad_mm.utils.registry import check_choice

MODEL = '"embedded", a folder, or a name on the Hub'
DATA = '"embedded", a folder, or a name on the Hub'
IMAGES = f"{DATA}; labels are not needed"
SOURCE = "a source, e.g. open_clip:embedded, open_clip:ViT-B-32/openai or hf:openai/clip-vit-base-patch32"


class UsageError(Exception):
    """An error in the command line."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of ``zepad``.

    Attributes:
        about: what it does, in a sentence.
        example: a command line that works, shown by ``--help`` and run by a test.
        declare: adds its arguments to a jsonargparse parser.
        run: runs it and returns the exit code.
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
        parser.add_argument("--quiet", action="store_true", help="hide progress")
        return parser


def print_result(options: Any, values: Any, text: str) -> None:
    """Print the result: ``values`` as JSON with ``--json``, else ``text``."""
    print(json.dumps(values) if options.json else text)


def budget(text: str, norm: str = "linf") -> float:
    """Parse a budget in pixels of [0, 1]: "4/255" or "0.0157"; any length in L2. Raises ValueError for "8" in L-inf."""
    numerator, slash, denominator = str(text).partition("/")
    try:
        value = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--eps: expected a budget such as 4/255 or 0.0157, got {text!r}") from None
    if not 0 < value <= (1 if norm == "linf" else float("inf")):
        meant = f"{value:g}/255" if 1 < value <= 255 else "4/255"
        raise ValueError(
            f"--eps: expected a budget above 0 and at most 1, in pixels of [0, 1], got {text!r}; write e.g. {meant}"
        )
    return value


def declare_policy(parser: Any) -> None:
    """Add ``--policy``; :func:`check_policy` checks it."""
    parser.add_argument(
        "--policy",
        type=str,
        default=None,
        help="zero_sacrifice (clean accuracy kept) or white_box (robust to attackers who know the defence), for models "
        "with a gate (default: the model's own)",
    )


def check_policy(options: Any) -> None:
    """Raise ValueError for an unknown ``--policy``, before a model is loaded."""
    if options.policy is not None:
        from zepad_mm.models.config import Policy

        check_choice("--policy", options.policy, get_args(Policy))


def split_commas(text: str) -> list[str]:
    """The non-empty parts between commas, stripped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def split_labels(text: str) -> list[str]:
    """Labels between commas. Raises UsageError when there are none."""
    labels = split_commas(text)
    if not labels:
        raise UsageError('--labels: expected names separated by commas, e.g. --labels "a cat,a dog"')
    return labels


def output_paths(out: str | Path, *names: str) -> list[str]:
    """Paths of files in a folder, for messages and JSON."""
    return [str(Path(out) / name) for name in names]
