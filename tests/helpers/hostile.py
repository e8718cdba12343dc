"""Hostile values in JSON files: numbers, types and sizes that no program writes, put in the place of any value."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

PLACE = "@place@"
RAW = (  # as they stand in a file
    *("NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "-1", "0", "9223372036854775808", "0.5", "1e300"),
    *("true", "null", '""', '"x"', '"\\u0000"', '"\\ud800"', '"../../x"', '"(a+)+$"', '"["', '"none"'),
    *("[]", "{}", "[null]", '["a", 1]', "[NaN]", '{"": null}', '{"a": {"a": 1e999}}', '["x", "x"]'),
    *(
        "[" * 50 + "]" * 50,
        '{"a":' * 900 + "1" + "}" * 900,
        "[" * 20000 + "]" * 20000,
        '{"a":' * 20000 + "1" + "}" * 20000,
    ),
    *('"' + "y" * 200_000 + '"', "[" + "1," * 50_000 + "1]", "[" + '"z",' * 50_000 + '"z"]'),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in nested dictionaries and lists; of a list only to its first two."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def damaged(value: Any, path: tuple[Any, ...], raw: str | None) -> str:
    """``value`` as JSON with ``raw`` at ``path``; None leaves the entry out."""
    if not path:
        return raw or ""
    copy = json.loads(json.dumps(value))
    inside = copy
    for key in path[:-1]:
        inside = inside[key]
    if raw is None:
        del inside[path[-1]]
        return json.dumps(copy)
    inside[path[-1]] = PLACE
    return json.dumps(copy).replace(f'"{PLACE}"', raw)


def samples(value: Any, count: int | None, seed: int = 0) -> Iterator[tuple[tuple[Any, ...], str, str]]:
    """(path, what stands there, the whole file) of ``count`` random damages, all of them for None."""
    pairs = [(path, raw) for path in places(value) for raw in (*RAW, None)]
    if count is not None:
        pairs = random.Random(seed).sample(pairs, min(count, len(pairs)))
    for path, raw in pairs:
        yield path, (raw or "missing")[:40], damaged(value, path, raw)


def nested(depth: int, as_list: bool = True) -> Any:
    """A list in a list, or a dictionary in a dictionary, ``depth`` times."""
    value: Any = []
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


PYTHON = [  # as a program might pass them
    *(float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 2**63, -1, 0, 0.5, 1e300, 1j, True, None),
    *("", "x", "(a+)+$", "\x00", "\ud800", "../../x", "y" * 200_000, b"x", object(), type, print, {1, 2}),
    *([], {}, [None], [[]], ["a", 1], ["cat", "cat"], ["a"] * 20_000, list(range(20_000)), [float("nan")], [10**400]),
    *({"a": float("nan")}, {1: 2}, {None: 1}, {"y" * 200_000: 1}, {"self": 1}, {"cls": 1}, [{"name": "a"}]),
    *(nested(100), nested(20_000), nested(100, False), nested(20_000, False)),
]
