"""Atomic output: a file or a set of files is the old one or the new one, at whatever moment a run is killed.

Files are written into a hidden folder beside their place and renamed. A set of files is complete once its hidden folder
is renamed to :data:`SAVED`; from then on each reader that calls :func:`complete_folder` moves the rest into place.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zepad_mm.utils.locks import open_until_exit, try_lock, wait_for_lock

STAGING = ".zepad-tmp-"  # folders with unfinished files; locked while their process is alive
SAVED = ".zepad-saved"  # a finished set of files, to be moved into place
_cleaned: set[Path] = set()  # folders without files of killed runs


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path that takes the place of ``path`` once the block ends without an error.

    Written, synchronised, renamed: a kill or a full disk at any moment leaves the old file as it was. A symbolic link
    is replaced, its target is untouched. The mode is the one of the user's umask.

    Raises OSError that names ``path`` when it cannot be written.
    """
    path = Path(path)
    with _staging(path.parent, path) as folder, _naming_errors(folder, path.parent, path):
        temporary = folder / path.name
        temporary.touch()  # with the user's umask
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        _synchronise(temporary)
        temporary.chmod(mode)  # safetensors writes 0600, which breaks shared folders and packages
        temporary.replace(path)


def check_writable(path: str | Path) -> None:
    """Make the folder of a file. Raises OSError that names the file when it could not be written there."""
    path = Path(path)
    with _staging(path.parent, path):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the name of a file")


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder whose files together replace those of the same names in ``folder`` once the block ends.

    Until then ``folder`` is as it was, afterwards it has all new files; other files in it are kept. Symbolic links in
    it are replaced, never written through. Readers call :func:`complete_folder` first.

    Raises OSError that names the file, or the folder, when it cannot be written.
    """
    folder = Path(folder)
    with _staging(folder, folder) as staged, _naming_errors(staged, folder, folder):
        yield staged
        probe = staged / STAGING
        probe.touch()
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
        for path in staged.rglob("*"):
            if path.is_file():
                path.chmod(mode)
                _synchronise(path)
        with _exclusive(folder):
            _move_into_place(folder)  # what a killed run finished before
            staged.rename(folder / SAVED)
            _move_into_place(folder)


def complete_folder(folder: str | Path) -> None:
    """Finish a :func:`replacing_folder` whose process was killed after it was complete; cheap where there is none.

    Raises OSError when the folder cannot be written to.
    """
    folder = Path(folder)
    if _is_folder(folder / SAVED):
        try:
            with _exclusive(folder):
                _move_into_place(folder)
        except OSError as error:
            raise type(error)(
                f"{folder} was saved by a run that was killed, and its files cannot be moved from {SAVED} into place "
                f"({error.strerror or error}); make the folder writable, or copy it to one that is"
            ) from error


@contextmanager
def _staging(parent: Path, path: Path) -> Iterator[Path]:
    """A new hidden folder in ``parent``, locked, and removed at the end; those of killed runs are removed too."""
    while True:
        folder = parent / f"{STAGING}{secrets.token_hex(4)}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(parent)
            folder.mkdir()
        except OSError as error:
            raise _unwritable(path, error) from error
        with open_until_exit(folder, os.O_RDONLY) as handle:
            try_lock(handle)
            if not folder.exists():  # removed by another process before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _remove_unfinished(parent: Path) -> None:
    """Remove what killed runs left, once per process: the folder may hold very many files."""
    if parent.name.startswith(STAGING) or parent.absolute() in _cleaned:
        return
    _cleaned.add(parent.absolute())
    with os.scandir(parent) as entries:
        stale = [Path(entry) for entry in entries if entry.name.startswith(STAGING) and entry.is_dir()]
    for folder in stale:
        with suppress(OSError), open_until_exit(folder, os.O_RDONLY) as handle:
            if try_lock(handle):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """The only process that moves files in ``folder``; an unfinished folder belongs to one process anyway."""
    if folder.name.startswith(STAGING):
        yield
        return
    with open_until_exit(folder, os.O_RDONLY) as handle:
        wait_for_lock(handle)
        yield


def _move_into_place(folder: Path) -> None:
    saved = folder / SAVED
    if _is_folder(saved):
        _move_files(saved, folder)


def _move_files(source: Path, target: Path) -> None:
    """Move every file of ``source`` into ``target`` and remove ``source``; JSON, which names the others, last."""
    for path in sorted(source.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
        place = target / path.name
        if _is_folder(path):
            if place.is_symlink():
                place.unlink()
            place.mkdir(exist_ok=True)
            _move_files(path, place)
        else:
            path.replace(place)
    source.rmdir()


@contextmanager
def _naming_errors(staged: Path, folder: Path, path: Path) -> Iterator[None]:
    """Errors of the disk name the file that was to be written, not a temporary one."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        name = getattr(error, "filename", None)
        text = str(error)
        if name is not None and not str(name).startswith(str(staged)):
            raise  # of another file, which it names
        if "could not be written" not in text:  # else named by the writer of one file of several
            raise _unwritable(folder / Path(name).relative_to(staged) if name else path, error) from error
        raise type(error)(text.replace(str(staged), str(folder))) from error


def _unwritable(path: Path, error: Exception) -> OSError:
    kind = type(error) if isinstance(error, OSError) else OSError
    reason = getattr(error, "strerror", None) or error
    return kind(
        f"{path} could not be written ({reason}); make room, or give another folder; what was there before is intact"
    )


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _synchronise(path: Path) -> None:
    with path.open("rb") as written:
        os.fsync(written.fileno())
