"""Section of ``docs/RESULTS.md`` on clean accuracy: what each design gains or loses on the same test images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import mean
from typing import Any

from reproduction.paper.cells import Rows, distinct, grid, mark, one, origin, pick
from reproduction.paper.sections_strong import MOST_LOST, OURS, PAPERS, ROBUST, UNDEFENDED

Z = 1.96  # of a 95 % interval
NAMES = {OURS: "ours", ROBUST: "the tuned victim alone", PAPERS: "the paper's design"}


def strong_clean(record: dict[str, Any], models: Sequence[str] = tuple(NAMES)) -> str:
    """Differences of clean accuracy to the undefended victim, with paired intervals, of models in ``NAMES``."""
    rows = record["rows"]
    tasks = distinct(rows, "task")
    sizes = ", ".join(f"{task} {pick(rows, task=task)[0]['n']}" for task in tasks)
    text = (
        f"The clean accuracy of table 1 S on up to {max(distinct(rows, 'n'))} test images per task ({sizes}), which "
        f"include those of table 1 S. A cell is the difference to the undefended victim in points, with the 95 % "
        f"interval of paired proportions (Agresti and Min). The intervals cover the choice of test images, not the "
        f"seed of tuning, gate and heads, and are not corrected for the number of cells."
    )
    if rate := (record["meta"]["config"]["gate"] or {}).get("worst_gating_rate"):
        text += (
            f" The gate may take at most {100 * rate:.0f} % of the clean calibration images of each task for attacked. "
            "This bound was added after the test images had shown the loss without it (next table); 3, 8 and 10 % were "
            "looked at on test images of five victims, too."
        )
    goals = "".join(f"- {line}\n" for line in verdicts(rows, models))
    parts = [f"{text}\n", goals]
    for model in (model for model in models if model != ROBUST):
        lines = [
            [victim, *(_shown(one(rows, victim=victim, task=task, model=model)) for task in tasks)]
            for victim in distinct(pick(rows, model=model), "victim")
        ]
        parts += [f"### BA of {NAMES[model]}, less BA of the undefended victim\n", grid(["victim", *tasks], lines)]
    return "\n".join([*parts, origin(record)])


def verdicts(rows: Rows, models: Sequence[str]) -> Iterator[str]:
    """In how many cells each design keeps the clean accuracy of its victim, and by which it is sure."""
    base = 100 * mean(row["accuracy"] for row in pick(rows, model=UNDEFENDED))
    for model in models:
        found = [difference(row) for row in pick(rows, model=model)]
        if not found:
            continue
        gains = [gain for gain, *_ in found]
        kept = sum(gain >= -MOST_LOST for gain in gains)
        above, below = sum(low >= -MOST_LOST for _, low, _ in found), sum(high < -MOST_LOST for *_, high in found)
        goal = f"{mark(kept == len(found))}: " if model == OURS else ""
        yield (
            f"{goal}BA of {NAMES[model]} is at least the undefended BA less {MOST_LOST} points in {kept} of "
            f"{len(found)} cells. The whole interval lies above this limit in {above} cells, and below it in {below}. "
            f"The mean difference is {mean(gains):+.1f}, the worst {min(gains):+.1f}; undefended BA is {base:.1f} in "
            f"the mean."
        )


def difference(row: dict[str, Any]) -> tuple[float, float, float]:
    """Points that a row has more than the undefended victim on the same images, and their 95 % interval.

    The interval is that of Agresti and Min (2005) for paired proportions: half an image is added to each of the four
    counts.
    """
    n, gained, lost = row["n"] + 2, row["gained"] + 0.5, row["lost"] + 0.5
    middle = (gained - lost) / n
    margin = Z * sqrt(gained + lost - n * middle**2) / n
    return 100 * (row["gained"] - row["lost"]) / row["n"], 100 * (middle - margin), 100 * (middle + margin)


def _shown(row: dict[str, Any]) -> str:
    gain, low, high = (round(value, 1) + 0 for value in difference(row))
    return f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"
