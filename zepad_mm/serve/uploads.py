"""The folder in which gradio keeps uploads and the images that it shows, with a bound on its size."""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

BLOCK = 4096  # bytes that a file takes at least
IN_USE_S = 60  # files younger than this are not deleted


@cache
def upload_folder() -> Path:
    """A folder of this process alone, removed with it; gradio finds it by an environment variable at every use."""
    folder = TemporaryDirectory(prefix="zepad-uploads-")
    atexit.register(folder.cleanup)
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    return Path(folder.name).resolve()


class Uploads:
    """The files below a folder, of which the oldest give way to new ones.

    Args:
        folder: what lies in it already is kept.
        limit: bytes of all files.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._kept = {path for path, _, _ in self._files()}

    def make_room(self, wanted: int) -> bool:
        """Delete the oldest files until ``wanted`` more bytes fit. Returns False when they do not."""
        files = sorted(self._files(), key=lambda file: file[1])
        total = sum(size for _, _, size in files)
        for path, changed, size in files:
            if total + wanted <= self.limit:
                break
            if path in self._kept or time.time() - changed < IN_USE_S:
                continue
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()
            total -= size
        return total + wanted <= self.limit

    def _files(self) -> list[tuple[Path, float, int]]:
        """(path, time of change, bytes on disk) of each file."""
        found = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder) / name
                try:
                    status = path.lstat()
                except FileNotFoundError:  # deleted meanwhile
                    continue
                found.append((path, status.st_mtime, max(status.st_size, BLOCK)))
        return found
