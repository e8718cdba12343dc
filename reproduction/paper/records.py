"""Result files: all that a table needs, in columns; what is longer stays in the output folder of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zepad_mm.utils.io import read_json, write_json

Rows = list[dict[str, Any]]
REPORT_COLUMNS = ("model", "attack", "threat", "epsilon", "n", "accuracy", "ci_low", "ci_high", "upper_bound")
LONG = 200  # rows of a table from which repeated strings are stored once
TUNING_KEYS = ("defence", "data", "steps", "best_step", "validation", "seconds", "thawed")


def levels(epsilon: float) -> str:
    """A budget in levels of 255: "8/255"."""
    return f"{round(255 * epsilon, 2):g}/255"


def at_budget(title: str, epsilon: float) -> str:
    """The title of a white-box report at a further budget."""
    return f"{title} at {levels(epsilon)}"


def write_compact(path: str | Path, record: dict[str, Any]) -> None:
    """Write the compact form of a study's record: rows as columns, encoders per row said once, no fingerprints."""
    compact = {key: value for key, value in record.items() if value}
    if "tuning" in compact:
        compact["tuning"] = {
            name: {key: about[key] for key in TUNING_KEYS if about.get(key) is not None}
            for name, about in record["tuning"].items()
        }
    if "reports" in compact:
        compact["reports"] = {title: _compact_report(report) for title, report in record["reports"].items()}
        compact["selections"] = {
            title: {key: value for key, value in selection.items() if key != "tried"}
            for title, selection in record["selections"].items()
        }
    rows = record.get("rows", [])
    if rows and "members" in rows[0]:
        members: dict[str, dict[str, list[str]]] = {}
        for row in rows:
            members.setdefault(row["victim"], {})[row["model"]] = list(row["members"])
        compact["members"] = members
        compact["rows"] = [{key: value for key, value in row.items() if key != "members"} for row in rows]
    write_columns(path, compact)


def write_columns(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record as it is, its tables as columns."""
    write_json(path, _to_columns(record))


def read_compact(path: str | Path) -> dict[str, Any]:
    """Read a record; its tables are lists of dicts again."""
    found: dict[str, Any] = _to_rows(read_json(path))
    return found


def _compact_report(report: dict[str, Any]) -> dict[str, Any]:
    """The clean and worst-case rows of an evaluation, its fusion rule and its warnings."""
    rows = [
        {key: row[key] for key in REPORT_COLUMNS if key in row}
        for row in report["rows"]
        if row["attack"] == ("none" if row["threat"] == "clean" else "worst")
    ]
    model = {key: report["meta"]["config"]["model"].get(key) for key in ("fusion", "fusion_params", "policy")}
    return {"meta": {"config": {"model": model}, "warnings": report["meta"]["warnings"]}, "rows": rows}


def _to_columns(value: Any) -> Any:
    """Every list of flat dicts as ``{"columns": names, "values": lists}``; numbers to four digits.

    A list of ``LONG`` rows or more stores each repeated string of a column once, under "words"; "values" has its index.
    """
    if isinstance(value, dict):
        return {key: _to_columns(item) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    flat = value and all(isinstance(row, dict) and not _nested(row) for row in value)
    if not flat:
        return [_to_columns(item) for item in value]
    columns = list(dict.fromkeys(key for row in value for key in row))
    words = {key: dict.fromkeys(row.get(key) for row in value) for key in columns} if len(value) >= LONG else {}
    places = {
        key: {word: place for place, word in enumerate(found)}
        for key, found in words.items()
        if len(found) <= len(value) // 10 and all(isinstance(word, str) for word in found)
    }
    rows = [[places[key][row[key]] if key in places else _rounded(row.get(key)) for key in columns] for row in value]
    interned = {"words": {key: list(found) for key, found in places.items()}} if places else {}
    return {"columns": columns, **interned, "values": rows}


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _nested(row: dict[str, Any]) -> bool:
    return any(isinstance(item, dict | list | tuple) for item in row.values())


def _to_rows(value: Any) -> Any:
    """The inverse of :func:`_to_columns`."""
    if isinstance(value, list):
        return [_to_rows(item) for item in value]
    if not isinstance(value, dict):
        return value
    if {"columns", "values"} <= set(value) <= {"columns", "words", "values"}:
        rows = [dict(zip(value["columns"], row, strict=True)) for row in value["values"]]
        words = value.get("words", {})
        return [{key: words[key][item] if key in words else item for key, item in row.items()} for row in rows]
    return {key: _to_rows(item) for key, item in value.items()}
