"""Section of ``docs/RESULTS.md`` on clean accuracy: what each design gains or loses on the same test images."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from statistics import mean
from typing import Any

from reproduction.paper.cells import Rows, distinct, grid, one, origin, pick
from reproduction.paper.sections_strong import MOST_LOST, OURS, PAPERS, UNDEFENDED


def strong_clean(record: dict[str, Any]) -> str:
    """Differences of clean accuracy to the undefended victim, with paired intervals."""
    rows = record["rows"]
    tasks, models = distinct(rows, "task"), [model for model in (OURS, PAPERS) if pick(rows, model=model)]
    sizes = ", ".join(f"{task} {pick(rows, task=task)[0]['n']}" for task in tasks)
    text = (
        f"Table 1 S without attacks on more test images ({sizes}): points against the undefended victim, and their "
        f"95 % interval from the images that one of the two has right and the other wrong.\n"
    )
    goals = "".join(f"- {line}\n" for line in verdicts(rows, models))
    parts = [text, goals]
    for model in models:
        lines = [
            [
                victim,
                *(_shown(one(rows, victim=victim, task=task, model=model)) for task in tasks),
            ]
            for victim in distinct(pick(rows, model=model), "victim")
        ]
        parts += [f"### BA of {model}, less that of the victim\n", grid(["victim", *tasks], lines)]
    return "\n".join([*parts, origin(record)])


def verdicts(rows: Rows, models: list[str]) -> Iterator[str]:
    """In how many cells each design keeps the clean accuracy of its victim."""
    for model in models:
        found = [difference(row) for row in pick(rows, model=model)]
        gains = [gain for gain, _ in found]
        kept = sum(gain >= -MOST_LOST for gain in gains)
        below = sum(gain + margin < -MOST_LOST for gain, margin in found)
        goal = ("Reached: " if kept == len(found) else "NOT reached: ") if model == OURS else ""
        yield (
            f"{goal}{model}: at least the undefended BA less {MOST_LOST} points in {kept} of {len(found)} cells; in "
            f"{below} the whole interval lies below that. {mean(gains):+.1f} in the mean, {min(gains):+.1f} at worst."
        )
    base = mean(row["accuracy"] for row in pick(rows, model=UNDEFENDED))
    yield f"BA of the undefended victims: {100 * base:.1f} in the mean."


def difference(row: dict[str, Any]) -> tuple[float, float]:
    """Points that a row has more than the undefended victim on the same images, and half their 95 % interval."""
    n, gained, lost = row["n"], row["gained"], row["lost"]
    gain = (gained - lost) / n
    error = sqrt(max(gained + lost - n * gain**2, 0)) / n
    return 100 * gain, 100 * 1.96 * error


def _shown(row: dict[str, Any]) -> str:
    gain, margin = difference(row)
    return f"{gain:+.1f} ± {margin:.1f}"
