"""The identity of a run: whether stored results belong to the run that is asked for now."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any


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
            f"{where} belongs to a run with {first} = {before.get(first)!r}, now {first} = {now.get(first)!r}{also}; "
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
