"""Settings as frozen dataclasses: strict conversion from dictionaries and command lines, checked choices."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from zepad_mm.utils.registry import check_choice, did_you_mean, shorten
from zepad_mm.utils.text import parser_message

C = TypeVar("C", bound="Config")
LARGEST = 2**63 - 1  # integer, as JSON, YAML and torch hold it
DEEPEST = 32  # nested dictionaries and lists in a field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every configuration. Sub-classes are frozen, keyword-only dataclasses of JSON-able fields.

    A field annotated ``Literal[...]`` (or ``Literal[...] | None``) accepts only these values. Numbers
    of numpy become Python's own. A sub-class that adds
    checks of its own starts its ``__post_init__`` with ``super().__post_init__()``.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            plain = _without_numpy(value, f"{type(self).__name__}.{field.name}")
            if plain is not value:
                object.__setattr__(self, field.name, plain)
        for name, choices in literal_fields(type(self)).items():
            check_choice(name, getattr(self, name), choices)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """The inverse of :meth:`to_dict`. Raises ValueError on unknown or missing keys, or a wrong type."""
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} wants a dictionary, got {type(values).__name__}: {shorten(values)}")
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ValueError(
                    f"{cls.__name__} has no key {shorten(key)}{did_you_mean(key, fields)}. "
                    f"Known keys: {', '.join(fields)}. If the file comes from a newer zepad-mm, upgrade."
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
        return cls(**{key: convert_value(hints[key], value, f"{cls.__name__}.{key}") for key, value in values.items()})

    @classmethod
    def from_cli(cls: type[C], arguments: Sequence[str] | None = None) -> C:
        """Parse a command line: ``--config FILE.yaml``, and an option for every field, nested ones with dots.

        ``--print_config`` prints every field and exits. An unknown key in the file or on the command line, or one that
        stands twice in the file, ends the program with a line that names it. A boolean field with
        ``metadata={"flag": "its help"}`` is given as ``--name`` alone.

        Args:
            arguments: the words of the command line; None: those of this program.

        Raises:
            ValueError: a value that the settings refuse. SystemExit: anything else, with exit code 2 and one line on
                stderr.
        """
        from jsonargparse import ArgumentError, ArgumentParser

        module = sys.modules[cls.__module__]
        parser = ArgumentParser(description=(module.__doc__ or "").partition("\n")[0], exit_on_error=False)
        parser.add_argument("--config", action="config", help="YAML file; options after it override it")
        flags = {field.name: field.metadata["flag"] for field in dataclasses.fields(cls) if "flag" in field.metadata}
        parser.add_class_arguments(cls, skip=set(flags))
        for name, text in flags.items():
            parser.add_argument(f"--{name}", action="store_true", help=text)
        words = list(sys.argv[1:] if arguments is None else arguments)
        try:
            for path in _config_files(words):
                _check_keys(path, {field.name for field in dataclasses.fields(cls)})
            values = parser.parse_args(words).as_dict()
            values.pop("config")
        except (ArgumentError, RecursionError, ValueError) as error:
            text = parser_message(str(getattr(error, "message", None) or error))
            sys.stderr.write(f"{parser.prog}: {text}\n")
            raise SystemExit(2) from error
        return cls.from_dict(values)


def _config_files(words: Sequence[str]) -> list[Path]:
    """The files behind ``--config`` that are there; the parser names those that are not."""
    given = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    given += [after for word, after in itertools.pairwise(words) if word == "--config"]
    return [path for path in map(Path, given) if path.is_file()]


def _check_keys(file: Path, known: set[str]) -> None:
    """Raise ValueError for a key of a YAML file that stands twice, is unknown and empty, or holds itself.

    The parser takes the last of two, passes over what is empty, and follows an alias without end. What is no YAML is
    left to it too.
    """
    import yaml

    try:
        root = yaml.compose(file.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8: {error}") from error
    except (yaml.YAMLError, RecursionError):
        return
    if not isinstance(root, yaml.MappingNode):
        return
    for key in (name.value for name, _ in root.value):
        if key not in known and key not in ("config", "print_config"):
            raise ValueError(f"{file} has an unknown key {shorten(key)}{did_you_mean(key, known)}")
    _check_node(root, str(file), ())


def _check_node(node: Any, file: str, above: tuple[Any, ...]) -> None:
    """Raise ValueError for a key that stands twice in a mapping of a YAML file, or holds itself; the nodes above it."""
    parts = node.value if isinstance(node.value, list) else []
    if any(node is one for one in above) or len(above) > DEEPEST:
        raise ValueError(f"{file}, line {node.start_mark.line + 1}: expected values, got one nested without end")
    lines: dict[str, int] = {}
    for part in parts:
        name, value = part if isinstance(part, tuple) else (None, part)
        if name is not None:
            line = name.start_mark.line + 1
            if name.value in lines:
                raise ValueError(
                    f"{file}: the key {shorten(name.value)} stands twice, in the lines {lines[name.value]} and {line}"
                )
            lines[name.value] = line
        _check_node(value, file, (*above, node))


def literal_fields(cls: type[Config]) -> dict[str, tuple[Any, ...]]:
    """The fields of ``cls`` that accept only certain values, with these values."""
    choices = {}
    for name, hint in typing.get_type_hints(cls).items():
        options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if any(get_origin(option) is Literal for option in options):
            choices[name] = tuple(
                value
                for option in options
                for value in (get_args(option) if get_origin(option) is Literal else (None,))
            )
    return choices


def _without_numpy(value: Any, where: str) -> Any:
    """``value`` with numbers of numpy and torch, also nested ones, as Python's own; itself where there are none.

    Raises ValueError for arrays and tensors of several numbers, which no JSON can hold.
    """
    if isinstance(value, dict):
        items = {_without_numpy(key, where): _without_numpy(item, where) for key, item in value.items()}
        same = all(a is b for a, b in zip((*value, *value.values()), (*items, *items.values()), strict=True))
        return value if same else items
    if type(value) in (list, tuple):
        parts = [_without_numpy(item, where) for item in value]
        return value if all(a is b for a, b in zip(value, parts, strict=True)) else type(value)(parts)
    if type(value).__module__.partition(".")[0] not in ("numpy", "torch") or not hasattr(value, "tolist"):
        return value
    if getattr(value, "ndim", 0):
        raise ValueError(f"{where}: expected a plain value, got a {type(value).__name__} of shape {tuple(value.shape)}")
    return value.tolist()


def _convert_part(cls: type[C], value: Any, where: str) -> C:
    """A configuration inside another one. Raises ValueError that names the key it stands under."""
    try:
        return cls.from_dict(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _convert_to_one_of(options: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first of a union's types that takes the value."""
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return convert_value(option, value, where)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def convert_value(hint: Any, value: Any, where: str) -> Any:
    """``value`` in the shape that ``hint`` asks for: nested configs, tuples for lists, scalars checked.

    Raises ValueError that begins with ``where`` for another type, a number that is not finite, or one that no integer
    of 64 bits holds.
    """
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_to_one_of(get_args(hint), value, where)
    if isinstance(hint, type) and issubclass(hint, Config):
        return value if isinstance(value, hint) else _convert_part(hint, value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{where} wants a list, got {shorten(value)}")
        return tuple(convert_value(get_args(hint)[0], item, where) for item in value)
    if origin is dict or hint is dict:
        return _convert_dict(get_args(hint), value, where)
    _check_plain(value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (bool, int, float, str) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{where} wants {hint.__name__}, got {type(value).__name__}: {shorten(value)}")
    return value


def _convert_dict(hints: tuple[Any, ...], value: Any, where: str) -> dict[str, Any]:
    """A dictionary with names as keys; its values as its type asks for, else plain and not nested without end."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} wants a dictionary, got {shorten(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{where} wants names as keys, got {shorten(key)}")
    hint = hints[1] if len(hints) == 2 else Any
    return {key: convert_value(hint, item, f"{where}.{key[:60]}") for key, item in value.items()}


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raise ValueError for numbers that are not finite or have more than 64 bits, and for nesting without end."""
    if depth > DEEPEST:
        raise ValueError(f"{where} is nested more than {DEEPEST} deep")
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _check_plain(item, where, depth + 1)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{where} wants a number of at most 64 bits, got one of {value.bit_length()} bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} wants a finite number, got {value}")
