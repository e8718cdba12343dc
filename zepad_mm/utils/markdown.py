"""Markdown tables and the numbers in them, for every document that this repository writes.

Use::

    markdown_table(["model", "clean"], [["`zepad`", interval_text(0.431, 0.402, 0.46)]])
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns also line up as plain text.

    Args:
        head: column titles.
        lines: rows of as many cells.

    Raises:
        ValueError: a row with another number of cells than the head.
    """
    for line in lines:
        if len(line) != len(head):
            raise ValueError(f"markdown_table: expected {len(head)} cells as in the head, got {len(line)}: {line}")
    widths = [max(len(row[column]) for row in (head, *lines)) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, rule, *lines)
    )


def bullets(lines: Iterable[str]) -> str:
    """Return a Markdown list with one item per line."""
    return "\n".join(f"- {line}" for line in lines)


def percent(share: float) -> str:
    """Return a share in [0, 1] as a percentage without the sign: "43.1"."""
    return f"{100 * share:.1f}"


def interval_text(share: float, low: float, high: float) -> str:
    """Return a share and its interval in percent: "43.1 (40.2-46.0)"."""
    return f"{percent(share)} ({percent(low)}-{percent(high)})"
