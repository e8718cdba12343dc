"""Selection of rows of a result file, and their Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

Rows = list[dict[str, Any]]


def percent(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f})"


def mark(reached: bool) -> str:
    """How the verdict on a goal begins."""
    return "Reached" if reached else "NOT reached"


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


def by_attack(rows: Rows, models: list[str]) -> str:
    """Accuracy and attack success rate of each model under each T1 attack, mean over victims and tasks."""
    attacked = [{**row, "attack": row["condition"].partition("@")[0]} for row in rows if row["threat"] == "T1"]
    lines = []
    for attack in distinct(attacked, "attack"):
        found = [pick(attacked, attack=attack, model=model) for model in models]
        shown = [
            f"{100 * mean(r['accuracy'] for r in f):.1f}, ASR {100 * mean(r['asr'] for r in f):.1f}" for f in found
        ]
        lines.append([attack, *shown])
    return grid(["attack", *models], lines)
