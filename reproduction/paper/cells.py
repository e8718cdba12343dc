"""Selection of rows of a result file, and their Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Rows = list[dict[str, Any]]


def percent(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f})"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return (
        "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)])
        + "\n"
    )


def origin(record: dict[str, Any]) -> str:
    """Commit, seed and hardware of a record, in one line."""
    meta = record["meta"]
    return f"Commit {meta['commit']}, seed {meta['seed']}, {meta['hardware']}.\n"


def pick(rows: Rows, **wanted: Any) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def one(rows: Rows, **wanted: Any) -> dict[str, Any]:
    (found,) = pick(rows, **wanted)
    return found


def worst(rows: Rows, **wanted: Any) -> dict[str, Any]:
    """The row of the strongest attack."""
    return min(pick(rows, **wanted), key=lambda row: row["accuracy"])


def distinct(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))
