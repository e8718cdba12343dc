"""Markdown tables and the numbers in them."""

from __future__ import annotations

import pytest

from zepad_mm.utils.text import bullets, interval_text, markdown_table, percent


def test_markdown_table_aligns_columns() -> None:
    assert markdown_table(["model", "clean"], [["`a`", "1"], ["b", "22.0"]]).splitlines() == [
        "| model | clean |",
        "| ----- | ----- |",
        "| `a`   | 1     |",
        "| b     | 22.0  |",
    ]
    assert markdown_table(["model"], []).splitlines() == ["| model |", "| ----- |"]


def test_markdown_table_rejects_rows_of_another_length() -> None:
    with pytest.raises(ValueError, match="expected 2 cells as in the head, got 1"):
        markdown_table(["model", "clean"], [["a"]])


def test_numbers_are_percentages() -> None:
    assert percent(0.4312) == "43.1"
    assert interval_text(0.431, 0.402, 0.46) == "43.1 (40.2-46.0)"
    assert bullets(["a", "b"]) == "- a\n- b"
