"""Text: foreign text made safe for messages and logs, and the Markdown tables and numbers of every document.

Use::

    markdown_table(["model", "clean"], [["`zepad`", interval_text(0.431, 0.402, 0.46)]])
"""

from __future__ import annotations

import re
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


LONGEST = 100  # characters of foreign text in a message
OBJECT = re.compile(r"<[\w.]+ object at 0x[0-9a-fA-F]+>")
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{6,}")


def quoted(value: object, longest: int = LONGEST) -> str:
    """The ``repr`` of a value, shortened: without control characters, and at most about ``longest`` characters."""
    text = repr(value[: longest + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def printable(text: str) -> str:
    """The text with control characters as escapes, so that it can neither move the cursor nor begin a new line."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def without_addresses(text: str) -> str:
    """The text without memory addresses, which some libraries write into their errors."""
    return ADDRESS.sub("", OBJECT.sub("the file", text))


# what jsonargparse says, in the words of this package
PARSER_MESSAGES = (
    (re.compile(r"Parser key \"(?P<key>[\w.]+)\": ?"), r"\g<key>: "),
    (
        re.compile(
            r"Does not validate against any of the Union subtypes Subtypes: [\[(](?P<types>.*)[\])] Errors: .*"
            r"Given value: (?P<value>.*)"
        ),
        r"expected \g<types>, got \g<value>",
    ),
    (re.compile(r"Expected an? (?P<type>.*)\. Got value: "), r"expected \g<type>, got "),
    (re.compile(r"<class '(?:\w+\.)*(?P<name>\w+)'>"), r"\g<name>"),
    (re.compile(r"typing\.Literal\[(?P<choices>[^]]*)\]"), r"\g<choices>"),
    (re.compile(r"\bNoneType\b"), "null"),
    (re.compile(r"(?<=arguments are required: )--(?=\w+(,|$))"), ""),
    (re.compile(r"\b[a-z]+\.(?=(labels|out)(,|$))"), "--"),  # the required options; the others are positional
    (re.compile(r"(?<=arguments are required: )[a-z]+\.(?=\w+(,|$))|(?<=, )[a-z]+\.(?=\w+(,|$))"), ""),
    (re.compile(r"(got (?:True|False))$"), r"\1; YAML reads no, off, yes and on as booleans: write them in quotes"),
)


def parser_message(text: str) -> str:
    """An error of the command-line parser in one line: the key, what was expected and what was given."""
    text = " ".join(text.split())
    for pattern, plain in PARSER_MESSAGES:
        text = pattern.sub(plain, text)
    return text


def budget_text(epsilon: float, norm: str) -> str:
    """A budget as people read it: "4/255", "L2 0.5" or "3 % of the area"."""
    if norm == "patch":
        return f"{100 * epsilon:.3g} % of the area"
    return f"{epsilon * 255:.4g}/255" if norm == "linf" else f"L2 {epsilon:.4g}"
