"""The documents that users read, and the code in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of one language: ``python`` runs offline, ``py`` against a Hub on this machine."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.S | re.M)


def commands(document: Path) -> list[str]:
    """The command lines of the ``bash`` blocks, continued lines joined, without comments."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [" ".join(part.split()) for part in parts if part]


def name_of(document: Path) -> str:
    """Path of a document from the root, for the names of tests."""
    return str(document.relative_to(ROOT))
