"""The table as a figure: what each defence keeps under each attack, and the frontier of what fuses both encoders."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from reproduction.cross_defence.page import Table, is_cap, title
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.text import budget_text

ENDS = ("undefended", "robust")  # the encoders between which a fusion chooses
FUSIONS = ("interpolation", "zepad_rule", "mixed_nuts", "adaptive_smoothing")
# column -> marker and colour; clean images first, the strongest attack last
MARKS = (("o", "#4c72b0"), ("s", "#8c8c8c"), ("^", "#dd8452"), ("D", "#c44e52"), ("X", "#7a1f1f"))


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
    columns = {
        "clean": lambda key: table.share(key, "clean"),
        "T1": lambda key: table.share(key, "T1"),
        f"authors' attack, {strong}": lambda key: table.share(key, "authors", table.strong),
        f"adaptive, {weak}": lambda key: table.share(key, "adaptive", table.weak),
        f"adaptive, {strong}": table.adaptive,  # the same line where there is one budget
    }
    rows = range(len(table.defences))
    for (name, share), (marker, colour) in zip(columns.items(), MARKS, strict=False):
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
    axes.legend(loc="lower right", fontsize=8)


def _draw_frontier(axes: Axes, table: Table) -> None:
    """Clean accuracy against that under the adaptive attack at the smaller budget; the gate's dial as a line."""
    column = ("adaptive", table.weak)
    measured = [key for key in table.defences if table.share(key, *column)]
    dial = [key for key in ("robust", *filter(is_cap, measured), "ours") if key in measured]
    points = {}
    for key in (*ENDS, *FUSIONS, *dial):
        clean, attacked = table.share(key, "clean"), table.share(key, *column)
        if clean and attacked:
            points[key] = (100 * clean.value, 100 * attacked.value)
            low, high = (100 * bound for bound in attacked.interval)
            bars = [[points[key][1] - low], [high - points[key][1]]]
            axes.errorbar(*points[key], yerr=bars, fmt="o", capsize=2, color="#c44e52" if key in dial else "#4c72b0")
            axes.annotate(title(key), points[key], xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.plot(*zip(*(points[key] for key in dial if key in points), strict=True), color="#c44e52", alpha=0.6)
    axes.set_xlabel("clean accuracy in %")
    axes.set_ylabel(f"adaptive attack, {budget_text(table.weak, 'linf')}, in %")
    axes.grid(alpha=0.3)
