"""Locks on folders that the system releases when their process ends, however it ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system: runs are not kept apart
    fcntl = None  # type: ignore[assignment]

RUN_LOCK = ".zepad-run"
_held: set[int] = set()  # descriptors of this process


def try_lock(handle: int) -> bool:
    """Lock an open file or folder for this process alone; False when another one holds it.

    True without a lock where the file system has none.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # network file systems without locks
        return True
    return True


def wait_for_lock(handle: int) -> None:
    """Lock an open file or folder once no other process holds it; at once where the file system has no locks."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)


@contextmanager
def open_until_exit(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of ``path`` whose lock no forked child keeps: worker processes may outlive this one for a while."""
    handle = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    _held.add(handle)
    try:
        yield handle
    finally:
        _held.discard(handle)
        os.close(handle)


def _close_in_child() -> None:
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def output_folder(folder: str | Path) -> Path:
    """The path of a folder that is written to. Raises ValueError for an empty one: the current folder is not meant."""
    if not str(folder):
        raise ValueError("out: expected the path of a folder, got ''; for the current one write '.'")
    return Path(folder)


def _name_owner(handle: int, folder: str | Path) -> None:
    try:
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:  # it names no file
        raise type(error)(
            error.errno, f"{folder} could not be written to ({error.strerror}); make room, or give another folder"
        ) from error


@contextmanager
def claim(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of an output folder, which is made if missing.

    The lock ends with the process, a killed one included; its file is removed at the end of the run.

    Raises:
        ValueError: another run writes to the folder. OSError: the folder cannot be written to.
    """
    path = output_folder(folder) / RUN_LOCK
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise type(error)(f"{folder}: a file is where a folder is expected; give another output folder") from error
    while True:
        with open_until_exit(path, os.O_RDWR | os.O_CREAT) as handle:
            if not try_lock(handle):
                owner = os.read(handle, 200).decode(errors="replace").strip()
                raise ValueError(
                    f"{folder} is in use by another run ({owner or 'just started'}); wait for its end, stop it, or "
                    "give another output folder"
                )
            if not os.fstat(handle).st_nlink:  # a run that ended meanwhile removed this file
                continue
            try:
                _name_owner(handle, folder)
                yield
            finally:
                path.unlink(missing_ok=True)
                if is_new:  # a run that failed early leaves no empty folder
                    with suppress(OSError):
                        path.parent.rmdir()
            return
