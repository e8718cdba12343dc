"""Provenance of results: commit, configuration, seed, hardware, library versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from zepad_mm import __version__

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
