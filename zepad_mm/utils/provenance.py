"""Where a result comes from (commit, hardware, versions), and whether stored results belong to the run of now."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zepad_mm import __version__
from zepad_mm.utils.registry import shorten


def changed_keys(stored: Mapping[str, Any], current: Mapping[str, Any], ignore: Collection[str] = ()) -> list[str]:
    """The keys in which two identities differ, sorted; those of nested dictionaries are joined by dots.

    Args:
        stored: as read from JSON.
        current: JSON-able.
        ignore: keys that may differ, as this function names them.
    """
    before, now = _flat(stored), _flat(current)
    return sorted(key for key in before.keys() | now.keys() if key not in ignore and before.get(key) != now.get(key))


def check_identity(
    stored: Mapping[str, Any],
    current: Mapping[str, Any],
    where: object,
    *,
    ignore: Collection[str] = (),
    remedy: str = "put it back to resume, or give another output folder to start again",
) -> None:
    """Raise ValueError that names the keys in which a stored run differs from the current one, and the remedy.

    Args:
        stored, current, ignore: as of :func:`changed_keys`.
        where: the file or folder of the stored run.
        remedy: end of the message.
    """
    changed = changed_keys(stored, current, ignore)
    if changed:
        first, before, now = changed[0], _flat(stored), _flat(current)
        also = f" (and other values of {', '.join(changed[1:])})" if changed[1:] else ""
        raise ValueError(
            f"{where} belongs to a run with {first} = {shorten(before.get(first))}, now {first} = "
            f"{shorten(now.get(first))}{also:.500}; "
            f"{remedy}"
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys, as JSON stores them."""
    flat: dict[str, Any] = {}

    def add(part: Mapping[str, Any], prefix: str) -> None:
        for key, value in part.items():
            if isinstance(value, dict) and value:
                add(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    add(json.loads(json.dumps(values)), "")
    return flat


LIBRARIES = ("torch", "torchvision", "open-clip-torch", "timm", "transformers", "datasets", "accelerate", "peft")


def commit() -> str:
    """The commit of the checkout this package runs from, with "-dirty" for changed code; the version without one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return f"zepad-mm {__version__}"
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "*.py"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return f"zepad-mm {__version__}"
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def hardware() -> str:
    """GPUs by name, or the CPU with its cores and the threads in use."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = lines[0] if lines else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries below it."""
    found = {"python": platform.python_version(), "zepad-mm": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def origin() -> dict[str, Any]:
    """Commit, hardware and versions, for records that hold their configuration elsewhere."""
    return {"commit": commit(), "hardware": hardware(), "versions": versions()}


def provenance(*, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """The ``meta`` entry of every result file."""
    return {**origin(), "config": config, "seed": seed}
