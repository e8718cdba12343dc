"""Class names: cleaned for prompts, and checked. Imports nothing heavy."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

JOINERS = "\u200c\u200d"  # without and with a ligature
FIRST_TAG = "\U000e0000"  # from here on they tell flags of regions apart
MAX_NAMES = 100_000  # of one model or label set: the text tower encodes each


def clean_name(name: str) -> str:
    """A class name as a person would write it, in composed Unicode: ``"T_shirt "`` becomes ``"T shirt"``.

    Characters that nobody sees (zero-width spaces, soft hyphens, marks of direction) are dropped: a tokenizer would
    read them. Joiners stay, which emoji and some scripts are written with.
    """
    words = " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())
    if words.isascii() and words.isprintable():
        return words
    return " ".join("".join(letter for letter in words if not _is_invisible(letter)).split())


def _is_invisible(letter: str) -> bool:
    """Whether a character is for control or formatting, and not part of emoji or of the spelling of a script."""
    return unicodedata.category(letter) in ("Cc", "Cf") and letter not in JOINERS and letter < FIRST_TAG


def check_names(names: Sequence[str], what: str = "class names", *, fold_case: bool = True) -> list[str]:
    """The names as a list, if there is at least one and none is empty, or the same text as another.

    Names are the same text if they differ in case, underscores, white space or Unicode form alone.

    Args:
        names: to check.
        what: they are, for messages.
        fold_case: False for the names of published data sets: ImageNet has a Cardigan and a cardigan.

    Raises:
        ValueError: no names, too many, an empty one, or duplicates.
    """
    if isinstance(names, str):
        raise ValueError(f"{what}: expected a list of strings, got the string {names!r:.100}; write [{names!r:.100}]")
    if isinstance(names, set | frozenset):
        raise ValueError(f"{what}: expected a list of strings, got a set, which has no order; write sorted(...)")
    if not isinstance(names, Iterable):
        raise ValueError(f"{what}: expected a list of strings, got {names!r:.100}; write e.g. ['cat', 'dog']")
    names = [str(name) if isinstance(name, str) else name for name in names]  # strings of numpy as Python's own
    if not names:
        raise ValueError(f"{what}: the list is empty; give at least one name, e.g. ['cat', 'dog']")
    if len(names) > MAX_NAMES:
        raise ValueError(f"{what}: expected at most {MAX_NAMES:,}, got {len(names):,}")
    first: dict[str, str] = {}
    twice = []
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{what}: expected non-empty strings, got {name!r:.100}")
        if not _is_unicode(name):
            raise ValueError(
                f"{what}: {name!r:.100} is not valid Unicode; expected UTF-8, which the terminal or the file that it "
                "comes from may not be in"
            )
        text = unicodedata.normalize("NFC", clean_name(name).casefold() if fold_case else clean_name(name))
        if not text:
            raise ValueError(f"{what}: expected names with letters, got {name!r:.100}")
        if text in first:
            twice.append(name if first[text] == name else f"{first[text]} (also as {name})")
        first.setdefault(text, name)
    if twice:
        raise ValueError(f"{what}: given more than once: {', '.join(text[:100] for text in sorted(set(twice))[:10])}")
    return names


def _is_unicode(text: str) -> bool:
    """Whether a string has no half of a character: Python reads what is not UTF-8 into those."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
