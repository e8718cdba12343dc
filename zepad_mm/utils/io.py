"""Atomic files: JSON, text and safetensors, read with errors that name the file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.registry import shorten

# what values of an unexpected type raise where they are used
WRONG_CONTENT = (
    *(KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError, OverflowError, AssertionError),
    RecursionError,
)
MOST_INFLATED, SMALL_FILE = 4, 2**26  # times, and bytes beside: what an archive of tensors may unpack to
ASSETS = Path(__file__).parents[1] / "assets"  # what ships with the package


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: str | Path, text: str) -> None:
    """Append a line to a text file. Raises OSError that names it, also for a symbolic link, which is not followed."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        reason = "it is a symbolic link" if Path(path).is_symlink() else error.strerror
        raise type(error)(f"{path} could not be written ({reason}); make room, or give another folder") from error


def keep_lines(path: str | Path, keep: Callable[[Any], bool]) -> None:
    """Drop the lines of a JSON Lines file from the first one on that a kill cut off or ``keep`` is False for.

    A symbolic link is replaced by an empty file, so that nothing is appended to its target.
    """
    path, kept = Path(path), []
    if path.is_symlink():
        write_text(path, "")
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if not keep(json.loads(line)):
                break
        except json.JSONDecodeError:
            break
        kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically, a row of a table on one line. Raises ValueError for NaN, unknown to JSON."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # tuples as lists, keys as strings
    write_text(path, _indented(plain) + "\n")


def _indented(value: Any, indent: str = "") -> str:
    """Indented JSON; a dict or list that holds no other takes one line."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, dict | list) for item in items):
        return json.dumps(value)
    inner = indent + "  "
    parts = [_indented(item, inner) for item in items]
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {part}" for key, part in zip(value, parts, strict=True)]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{last}"


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises ValueError that names the file when it is cut off, no JSON, nested too deep or holds NaN."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a complete JSON file: {error}") from error
    return parse_json(text, f"{path} is not a complete JSON file")


def parse_json(text: str, fault: str) -> Any:
    """JSON in a string, as :func:`read_json`; the message begins with ``fault``."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"{fault}: it is nested too deep") from error
    except ValueError as error:  # of the parser, and of integers with thousands of digits
        raise ValueError(f"{fault}: {error}") from error


def parse_metadata(metadata: dict[str, str], key: str, path: object) -> dict[str, Any]:
    """A JSON dictionary in the metadata of a safetensors file. Raises ValueError that names the file."""
    found = parse_json(metadata.get(key, "null"), f"{path} is damaged: {key!r} in its metadata is no JSON")
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: expected a dictionary as {key!r} in its metadata, got {shorten(found)}")
    return found


def check_not_inflated(path: Path) -> None:
    """Raise ValueError for a zip archive, as torch and numpy write, that unpacks to far more than its size."""
    if not zipfile.is_zipfile(path):
        return
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:  # who reads it next names the damage
        packed, unpacked = path.stat().st_size, sum(entry.file_size for entry in archive.infolist())
        if unpacked > MOST_INFLATED * packed + SMALL_FILE:
            raise ValueError(f"{path} unpacks to {unpacked / 2**20:.0f} MB from {packed / 2**20:.2f}; it is damaged")


@contextmanager
def damage_of(path: object) -> Iterator[None]:
    """Within, what entries of a wrong type or missing ones of a file raise is a ValueError that names the file."""
    try:
        yield
    except WRONG_CONTENT as error:
        reason = f"it lacks {error}" if type(error) is KeyError else str(error)
        raise ValueError(f"{path} is damaged, or of another version of zepad-mm: {reason:.300}") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Raises OSError that names the file where there is no room for it."""
    import torch
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        # safetensors refuses tensors that share memory, and slices of a larger one would be written whole
        alone = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        save_file(alone, temporary, metadata=metadata)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises ValueError that names a damaged file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a safetensors file there")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}; fetch or write it again") from error
