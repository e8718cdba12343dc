"""``zepad doctor``."""

from __future__ import annotations

import re
from typing import Any

from zepad_mm.cli.common import Command, told

EXTRAS = ("serve", "attacks", "ssl")  # what users may want; the others are for developers


def _run(options: Any) -> int:
    from zepad_mm.utils.io import ASSETS
    from zepad_mm.utils.provenance import commit, hardware, versions

    missing = _missing(None)
    extras = {name: _missing(name) for name in EXTRAS}
    shipped = {
        name: (ASSETS / name).is_dir() and any((ASSETS / name).iterdir()) for name in ("clip", "clothing", "zepad")
    }
    found = {
        "commit": commit(),
        "hardware": hardware(),
        "devices": _devices(),
        "versions": versions(),
        "shipped": shipped,
        "missing": missing,
        "extras": extras,
    }
    lines = [f"{name:18} {number}" for name, number in versions().items()]
    lines += [f"{'commit':18} {found['commit']}", f"{'hardware':18} {found['hardware']}"]
    lines += [f"{'devices':18} {', '.join(_devices())}"]
    for name, there in shipped.items():
        lines.append(
            f"{'shipped ' + name:18} {'there' if there else 'MISSING: reinstall, or rebuild it with scripts/'}"
        )
    for name, lacks in extras.items():
        get = f"lacks {', '.join(lacks)}; get it: pip install 'zepad-mm[{name}]'" if lacks else "there"
        lines.append(f"{'extra ' + name:18} {get}")
    get = (
        f"{', '.join(missing)}; get them: pip install {' '.join(repr(line) for line in missing)}" if missing else "none"
    )
    lines.append(f"{'missing packages':18} {get}")
    told(options, found, "\n".join(lines))
    return 0 if not missing and all(shipped.values()) else 1


def _devices() -> list[str]:
    import torch

    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def _missing(extra: str | None) -> list[str]:
    """Requirements, of the package itself or of an extra, that are not installed."""
    from importlib.metadata import PackageNotFoundError, requires, version

    try:
        wanted = requires("zepad-mm") or []
    except PackageNotFoundError:  # run from a checkout that was not installed
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
    about="Show versions and devices, and what is missing and how to get it.",
    example="zepad doctor",
    declare=lambda parser: None,
    run=_run,
)
