"""Frozen dataclasses to and from plain dictionaries, strictly: an unknown key is an error that names it."""

from __future__ import annotations

import dataclasses
import types
import typing
from difflib import get_close_matches
from typing import Any, TypeVar, Union, get_args, get_origin

C = TypeVar("C", bound="Config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration. Sub-classes are frozen, keyword-only dataclasses of JSON-able fields."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """The inverse of :meth:`to_dict`. Raises ValueError on unknown or missing keys, or a wrong type."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} wants a dictionary, got {type(values).__name__}: {values!r}")
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                near = get_close_matches(key, fields, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{cls.__name__} has no key {key!r}{hint}. Known keys: {', '.join(fields)}. "
                    "If the file comes from a newer zepad-mm, upgrade."
                )
        missing = [
            name
            for name, field in fields.items()
            if name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{cls.__name__} lacks the keys {', '.join(map(repr, missing))}")
        return cls(**{key: _convert(hints[key], value, f"{cls.__name__}.{key}") for key, value in values.items()})


def _convert_to_one_of(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first of a union's types that takes the value."""
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, where)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` in the shape that ``hint`` asks for: nested configs, tuples for lists, scalars checked."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_to_one_of(get_args(hint), value, where)
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else hint.from_dict(value)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{where} wants a list, got {value!r}")
        return tuple(_convert(get_args(hint)[0], item, where) for item in value)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} wants a dictionary, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (bool, int, float, str) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{where} wants {hint.__name__}, got {type(value).__name__}: {value!r}")
    return value
