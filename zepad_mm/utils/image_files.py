"""The image files of a folder. Imports nothing heavy: commands look at folders before they load a model."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
HIDDEN = (".", "__MACOSX", "@eaDir")  # beginnings of names: of systems, and of the thumbnails that a NAS keeps


def entries(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Image files of a folder, and of each folder in it that has any (at any depth), by path; hidden ones are left out.

    Links are followed. A folder that several links lead to counts once for each folder directly in ``folder``.
    """
    direct: list[str] = []
    inside: dict[str, list[str]] = {}
    left_out: dict[str, int] = {}
    seen: set[tuple[str, str]] = {("", os.path.realpath(folder))}  # folder directly inside, what the path leads to
    for root, folders, files in os.walk(folder, followlinks=True):
        top = "".join(Path(root).relative_to(folder).parts[:1])
        folders[:] = [name for name in sorted(folders) if not _hidden(name) and _first_time(seen, root, name, top)]
        names = [name for name in sorted(files) if not _hidden(name)]
        for name in names:
            if (suffix := Path(name).suffix.lower()) not in SUFFIXES:
                left_out[suffix] = left_out.get(suffix, 0) + 1
        found = [os.path.join(root, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
        if not top:
            direct = found
        elif found:
            inside.setdefault(top, []).extend(found)
    if left_out:
        log.info(
            "%s: left out what is no image: %s",
            folder,
            ", ".join(f"{n} {kind or 'without a suffix'}" for kind, n in left_out.items()),
        )
    return direct, inside


def _first_time(seen: set[tuple[str, str]], root: str, name: str, top: str) -> bool:
    """Whether a folder was not yet walked through for the folder ``top``, and is not the whole again."""
    real = os.path.realpath(os.path.join(root, name))
    key = (top or name, real)
    if key in seen or ("", real) in seen:
        return False
    seen.add(key)
    return True


def _hidden(name: str) -> bool:
    return name.startswith(HIDDEN)
