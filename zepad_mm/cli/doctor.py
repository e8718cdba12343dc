"""``zepad doctor``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from zepad_mm.cli.common import Command, print_result

EXTRAS = ("serve", "attacks", "ssl")  # the other extras are for developers


def _run(options: Any) -> int:
    from zepad_mm.utils.io import ASSETS
    from zepad_mm.utils.provenance import commit, hardware, versions

    missing = _missing(None)
    assets = ("clip", "clothing", "zepad")
    shipped = {name: (ASSETS / name).is_dir() and any((ASSETS / name).iterdir()) for name in assets}
    found = {
        "commit": commit(),
        "hardware": hardware(),
        "devices": _devices(),
        "versions": versions(),
        "shipped": shipped,
        "missing": missing,
        "extras": {name: _missing(name) for name in EXTRAS},
    }
    print_result(options, found, "\n".join(_lines(found)))
    return 0 if not missing and all(shipped.values()) else 1


def _lines(found: dict[str, Any]) -> Iterator[str]:
    def line(title: str, text: str) -> str:
        return f"{title:18} {text}"

    for name, number in found["versions"].items():
        yield line(name, number)
    yield line("commit", found["commit"])
    yield line("hardware", found["hardware"])
    yield line("devices", ", ".join(found["devices"]))
    for name, present in found["shipped"].items():
        yield line(f"shipped {name}", "present" if present else "MISSING: reinstall, or rebuild it with tools/")
    for name, lacking in found["extras"].items():
        install = f"missing {', '.join(lacking)}; install with: pip install 'zepad-mm[{name}]'"
        yield line(f"extra {name}", install if lacking else "present")
    missing = found["missing"]
    install = f"{', '.join(missing)}; install with: pip install {' '.join(map(repr, missing))}"
    yield line("missing packages", install if missing else "none")


def _devices() -> list[str]:
    import torch

    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def _missing(extra: str | None) -> list[str]:
    """Requirements of the package (None) or of an extra that are not installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    try:
        wanted = requires("zepad-mm") or []
    except PackageNotFoundError:  # a checkout that is not installed
        return []
    missing = []
    for line in wanted:
        requirement, _, marker = line.partition(";")
        named = re.search(r"extra == ['\"]([^'\"]+)['\"]", marker)
        if (named.group(1) if named else None) != extra:
            continue
        try:
            version(re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0])
        except PackageNotFoundError:
            missing.append(requirement.strip())
    return missing


DOCTOR = Command(
    about="Show versions, devices, and missing packages with the command that installs them.",
    example="zepad doctor",
    declare=lambda parser: None,
    run=_run,
)
