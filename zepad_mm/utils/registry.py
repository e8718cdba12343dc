"""Tables of named things (attacks, defences, fusion rules, ...), and checks of names with the nearest spelling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from reprlib import Repr
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
PLUGINS = "zepad_mm.plugins"  # entry points: modules of installed packages that register attacks, rules and the like
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 200


def did_you_mean(name: object, known: Collection[str]) -> str:
    """The end of an error message that names the nearest known spelling; empty where nothing is near."""
    near = get_close_matches(str(name)[:100], known, n=1) if isinstance(name, str | int | float) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(key: str, value: Any, choices: Collection[Any]) -> None:
    """Raise ValueError that names the key, its value, the choices and the nearest spelling, unless it is a choice."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        texts = [str(choice) for choice in choices]
        raise ValueError(f"{key}: expected one of {', '.join(texts)}, got {shorten(value)}{did_you_mean(value, texts)}")


def shorten(value: object) -> str:
    """``repr(value)`` for an error message: at most about 200 characters, whatever its size and nesting."""
    return _SHORT.repr(value)


@cache
def load_plugins() -> None:
    """Import the plugins of installed packages, once for each process; one that fails is logged and left out."""
    for plugin in entry_points(group=PLUGINS):
        try:
            plugin.load()
        except Exception as error:  # whatever somebody else's package raises on import
            log.warning("the plugin %s (%s) could not be loaded: %s", plugin.name, plugin.value, error)


class Registry(Generic[T]):
    """A named table that refuses duplicates and answers an unknown name with the nearest known one.

    Plugins are loaded when a name is asked for that is not there. Iteration shows what is registered so far, so that
    what an evaluation runs by default does not depend on what else is installed.

    Args:
        kind: what the table holds, in words, for the error messages ("attack", "fusion rule").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that stores what it decorates under ``name``. Raises ValueError when the name is taken."""

        def store(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"the {self.kind} {name!r} is registered already, as {self._entries[name]!r}")
            self._entries[name] = entry
            return entry

        return store

    def get(self, name: str) -> T:
        """The entry called ``name``. Raises ValueError that lists the names and suggests the nearest."""
        if name in self:
            return self._entries[name]
        hint = did_you_mean(name, self._entries)
        raise ValueError(f"unknown {self.kind} {shorten(name)}{hint or '.'} Known: {', '.join(self.names())}")

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if name not in self._entries:
            load_plugins()
        return name in self._entries
