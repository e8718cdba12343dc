#!/usr/bin/env python
"""Join the records of runs of ``reproduction.paper.run`` on different victims into one folder.

python -m reproduction.paper.join RESULT RESULT ... --out results/paper_strong

Each RESULT is a folder that a run wrote. Tables of the same name become one, whose victims are those of all; tables and
figures of the first studied victim alone must be there once.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from reproduction.paper.records import read_compact, write_columns

UNITED = ("victims", "studied", "repeated", "white_box_epsilons")  # settings of which the joined record has all values


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="folders of records")
    parser.add_argument("--out", type=Path, required=True, help="folder of the joined records")
    args = parser.parse_args(arguments)
    tables: dict[str, list[dict[str, Any]]] = {}
    for folder in args.results:
        for path in sorted(folder.glob("*.json")):
            tables.setdefault(path.name, []).append(read_compact(path))
    if not tables:
        parser.error(
            f"expected folders with records of reproduction.paper.run, got {', '.join(map(str, args.results))}"
        )
    for name, records in tables.items():
        write_columns(args.out / name, joined(records))
    for folder in args.results:
        for picture in sorted(folder.glob("*.png")):
            shutil.copy2(picture, args.out / picture.name)


def joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of several: lists one after the other, dictionaries by key. The first one's ``meta`` stays, with the
    victims of all.

    Raises ValueError for records of runs whose settings differ in more than their victims, for two of a table that
    shows one victim alone, and for two with the same victim.
    """
    first, settings = records[0], [_settings(record) for record in records]
    for other in settings[1:]:
        changed = sorted(key for key in other.keys() | settings[0].keys() if other.get(key) != settings[0].get(key))
        if changed:
            raise ValueError(
                f"records: expected runs that differ in their victims alone, but {', '.join(changed)} differ"
            )
    shown = [record["victim"] for record in records if "victim" in record]
    if len(shown) > 1:
        raise ValueError(f"records: expected a table of one victim once, got those of {', '.join(shown)}")
    _check_apart(records)
    config = dict(first["meta"]["config"])
    for key in UNITED:
        config[key] = list(dict.fromkeys(name for record in records for name in record["meta"]["config"].get(key, [])))
    config["paper_victims"] = [name for record in records for name in _papers(record["meta"]["config"])]
    found: dict[str, Any] = {"meta": {**first["meta"], "config": config}}
    for record in records:
        for key, value in record.items():
            if key == "meta":
                continue
            found[key] = (
                found[key] + value
                if isinstance(value, list) and key in found
                else ({**found.get(key, {}), **value} if isinstance(value, dict) else value)
            )
    return found


def _check_apart(records: list[dict[str, Any]]) -> None:
    """Raise ValueError where two records have rows of one victim, or reports of one title."""
    seen = set[str]()
    for record in records:
        names = {row["victim"] for row in record.get("rows", []) if "victim" in row} | set(record.get("reports", {}))
        if twice := sorted(seen & names):
            raise ValueError(f"records: expected each victim in one of them, got {', '.join(twice)} in two")
        seen |= names


def _papers(config: dict[str, Any]) -> list[str]:
    """The victims that a run shows the paper's defence of."""
    shown = config["paper_victims"]
    return [name for name in config["victims"] if shown is None or name in shown]


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    apart = (*UNITED, "paper_victims", "out", "result", "tables")
    return {key: value for key, value in record["meta"]["config"].items() if key not in apart}


if __name__ == "__main__":
    main()
