"""Text that was handed in, made safe for messages, log lines and terminals."""

from __future__ import annotations

import re

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


def budget_text(epsilon: float, norm: str) -> str:
    """A budget as people read it: "4/255", "L2 0.5" or "3 % of the area"."""
    if norm == "patch":
        return f"{100 * epsilon:.3g} % of the area"
    return f"{epsilon * 255:.4g}/255" if norm == "linf" else f"L2 {epsilon:.4g}"
