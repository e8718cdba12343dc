"""The table as a figure: what each defence keeps under each attack, and the frontier of what fuses both encoders."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reproduction.cross_defence.page import Table, is_cap, title
from zepad_mm.evaluation.metrics import Share
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.text import budget_text

FUSIONS = ("interpolation", "zepad_rule", "mixed_nuts", "adaptive_smoothing")


def write_figure(table: Table, path: Path) -> None:
    """Draw the table into a PNG file."""
    figure = Figure(figsize=(12, 0.32 * len(table.defences) + 1.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_columns(left, table)
    _draw_frontier(right, table)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(file.getvalue())


def _draw_columns(axes: Axes, table: Table) -> None:
    """A line for each defence, a mark for its accuracy under each attack."""
    strong, weak = (budget_text(epsilon, "linf") for epsilon in (table.strong, table.weak))
    rows = range(len(table.defences))
    columns: list[tuple[str, Callable[[str], Share | None], str, str]] = [
        ("clean", lambda key: table.share(key, "clean"), "o", "#4c72b0"),
        ("T1", lambda key: table.share(key, "T1"), "s", "#8c8c8c"),
        (f"authors' attack, {strong}", partial(_attacked, table, "authors"), "^", "#dd8452"),
        (f"adaptive, {strong}", partial(_attacked, table, "adaptive"), "X", "#7a1f1f"),
    ]
    if table.weak < table.strong:
        columns.append((f"adaptive, {weak}", lambda key: table.share(key, "adaptive", table.weak), "D", "#c44e52"))
    for name, share, marker, colour in columns:
        found = [(row, share(key)) for row, key in zip(rows, table.defences, strict=True)]
        points = [(100 * one.value, row) for row, one in found if one is not None]
        if points:
            values, places = zip(*points, strict=True)
            axes.scatter(values, places, marker=marker, color=colour, s=34, label=name, zorder=3)
    axes.set_yticks(list(rows), [title(key) for key in table.defences])
    axes.invert_yaxis()
    axes.set_xlim(-2, 100)
    axes.set_xlabel("accuracy in %, all tasks together")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3, fontsize=8, frameon=False)


def _attacked(table: Table, column: str, key: str) -> Share | None:
    """Under an attack at the larger budget, where that was measured on every task."""
    return table.share(key, column, table.strong) if key in table.attacked else None


def _draw_frontier(axes: Axes, table: Table) -> None:
    """Clean accuracy against that under the adaptive attack at the smaller budget; the dial of the gate as a line."""
    names = [key for key in table.attacked if key in ("undefended", *FUSIONS)]
    dial = [key for key in ("robust", *filter(is_cap, table.attacked), "ours") if key in table.attacked]
    points: dict[str, tuple[float, float]] = {}
    for key in (*names, *dial):
        clean, attacked = table.share(key, "clean"), table.share(key, "adaptive", table.weak)
        if clean and attacked:
            points[key] = (100 * clean.value, 100 * attacked.value)
            axes.scatter(*points[key], color="#c44e52" if key in dial else "#4c72b0", zorder=3)
    rows_first = sorted(points.items(), key=lambda item: (round(item[1][1] / 3), item[1][0]))
    for place, (key, point) in enumerate(rows_first):  # names on different sides of neighbours, or they overlap
        offset, side = ((6, 5), "left") if key in dial else ((-6, 6 if place % 2 else -12), "right")
        axes.annotate(title(key), point, xytext=offset, textcoords="offset points", fontsize=7, ha=side)
    line = [points[key] for key in dial if key in points]
    if line:
        axes.plot(*zip(*line, strict=True), color="#c44e52", alpha=0.6)
    axes.margins(0.4, 0.15)
    axes.set_xlabel("clean accuracy in %")
    axes.set_ylabel(f"adaptive attack, {budget_text(table.weak, 'linf')}, in %")
    axes.grid(alpha=0.3)
