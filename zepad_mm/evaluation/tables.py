"""Tables over several reports: models x threat models x data sets and seeds, as Markdown, LaTeX, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from zepad_mm.evaluation.report import OVERESTIMATED, Report, cell, is_upper_bound
from zepad_mm.evaluation.threats import CLEAN, WORST, RowKind, strength
from zepad_mm.utils.registry import Registry
from zepad_mm.utils.text import budget_text, markdown_table


@dataclass(frozen=True)
class Entry:
    """One accuracy of a table.

    Attributes:
        report: name of the report it comes from.
        dataset, seed, model, threat, attack, norm, epsilon, n: what was measured.
        accuracy, ci_low, ci_high: in [0, 1], with the 95 % Wilson interval.
        upper_bound: the model was not attacked itself, or by reduced attacks; its robust accuracy may be lower.
        seconds: what its attacks took, where that is known; ``wall_s`` what the whole report took.
        commit: of the code that wrote the report.
        overestimated: a diagnostic of the report failed.
        best: above all others on these images under this attack, with intervals that do not overlap.
    """

    report: str
    dataset: str
    seed: int
    model: str
    threat: str
    attack: str
    norm: str
    epsilon: float
    n: int
    accuracy: float
    ci_low: float
    ci_high: float
    upper_bound: bool
    seconds: float | None
    wall_s: float
    commit: str | None
    overestimated: bool
    best: bool = False

    @property
    def group(self) -> tuple[str, str, int]:
        """What may be compared: entries of one report on one data set."""
        return self.report, self.dataset, self.seed

    @property
    def column(self) -> tuple[str, str, str, float]:
        """What a column of the table has in common."""
        return self.threat, self.attack, self.norm, self.epsilon


def entries(reports: Mapping[str, Report]) -> list[Entry]:
    """Return the accuracies of named reports: the worst case of each threat model or, without one, each attack.

    A report may hold several data sets. The row of the fusion rule that ships is left out where it only repeats the
    row of the model as it ships: a model cannot be better than itself.

    Raises:
        ValueError: no report, a report without rows, or rows that lack something.
    """
    if not reports:
        raise ValueError("entries: expected at least one report, got none")
    found: list[Entry] = []
    for name, report in reports.items():
        if not report.rows:
            raise ValueError(f"{name}: the report holds no rows; expected those of a finished evaluation")
        try:
            found += _without_repetition([_entry(name, report, row) for row in _chosen(report)], report)
        except KeyError as error:
            raise ValueError(
                f"{name}: the report lacks {error.args[0]!r}; expected report.json as `zepad evaluate` writes it"
            ) from error
    return _with_best(found)


def _chosen(report: Report) -> list[dict[str, Any]]:
    worst = {(row["dataset"], row["threat"]) for row in report.rows if row["attack"] == WORST}
    order = {name: index for index, name in enumerate(report.models)}
    rows = [
        row
        for row in report.rows
        if row["attack"] == WORST or ((row["dataset"], row["threat"]) not in worst and not row.get("control", False))
    ]
    return sorted(rows, key=lambda row: order[row["model"]])  # stable: threats stay in the order they ran


def _entry(name: str, report: Report, row: Mapping[str, Any]) -> Entry:
    meta = report.meta
    copied = ("dataset", "model", "threat", "attack", "norm", "epsilon", "n", "accuracy", "ci_low", "ci_high")
    return Entry(
        **{key: row[key] for key in copied},
        report=name,
        seed=meta["seed"],
        upper_bound=is_upper_bound(row),
        seconds=row["seconds"],
        wall_s=meta["wall_s"],
        commit=meta["commit"],
        overestimated=report.doubted,
    )


def _without_repetition(found: list[Entry], report: Report) -> list[Entry]:
    """Drop the row of the rule that ships where it has the accuracies of the model as it ships."""
    if not report.single or not report.models_of(RowKind.DEFAULT):
        return found
    default = report.default
    shipped = f"{default}:{report.meta.get('config', {}).get('model', {}).get('fusion')}"
    values = {
        model: {(entry.dataset, *entry.column): entry.accuracy for entry in found if entry.model == model}
        for model in (default, shipped)
    }
    # T3 is measured for the model as it ships alone
    if any(values[default].get(key) != value for key, value in values[shipped].items()):
        return found
    return [entry for entry in found if entry.model != shipped]


def _with_best(found: Sequence[Entry]) -> list[Entry]:
    marked = []
    for entry in found:
        rivals = [
            other.ci_high
            for other in found
            if (other.group, other.column) == (entry.group, entry.column) and other.model != entry.model
        ]
        best = bool(rivals) and not entry.upper_bound and entry.ci_low > max(rivals)
        marked.append(replace(entry, best=best))
    return marked


# name -> renderer of entries
FORMATS: Registry[Callable[[Sequence[Entry]], str]] = Registry("table format")


@FORMATS.register("json")
def as_json(found: Sequence[Entry]) -> str:
    """Return a list of objects, one for each entry."""
    return json.dumps([asdict(entry) for entry in found], indent=2, allow_nan=False) + "\n"


@FORMATS.register("csv")
def as_csv(found: Sequence[Entry]) -> str:
    """Return one line for each entry, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Entry)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(entry) for entry in found)
    return text.getvalue()


@FORMATS.register("md")
def as_markdown(found: Sequence[Entry]) -> str:
    """Return a line for each model on each data set, a column for each threat model."""
    grid = _Grid(found)
    lines = [
        [*(f"`{text}`" if name == "model" else text for name, text in about), *(_bold(*c, "**{}**") for c in cells)]
        for block in grid.blocks
        for about, cells in block
    ]
    return markdown_table(grid.head, lines) + "\n\n" + " ".join(grid.notes) + "\n"


@FORMATS.register("latex")
def as_latex(found: Sequence[Entry]) -> str:
    """Return the same as a LaTeX float with booktabs; data sets are separated by a rule."""
    grid = _Grid(found)
    blocks = []
    for block in grid.blocks:
        lines, before = [], [""] * len(block[0][0])
        for about, cells in block:
            shown = [
                "" if text == old and name != "model" else text for (name, text), old in zip(about, before, strict=True)
            ]
            before = [text for _, text in about]
            values = [_bold(latex(text), best, r"\textbf{{{}}}") for text, best in cells]
            lines.append(" & ".join([*map(latex, shown), *values]) + r" \\")
        blocks.append("\n".join(lines))
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(' '.join(grid.notes))}}}",
            rf"\begin{{tabular}}{{{'l' * len(grid.head)}}}",
            r"\toprule",
            " & ".join(map(latex, grid.head)) + r" \\",
            r"\midrule",
            "\n\\midrule\n".join(blocks),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<=": r"$\leq$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def latex(text: str) -> str:
    """Plain text for LaTeX: every letter with a meaning of its own escaped."""
    pattern = "|".join(re.escape(key) for key in sorted(LATEX, key=len, reverse=True))
    return re.sub(pattern, lambda match: LATEX[match.group()], text)


class _Grid:
    """Entries laid out for people.

    Attributes:
        head: column titles.
        blocks: for each report and data set, its lines: (what it is about as (title, text), cells as (text, best)).
        notes: sentences that belong below or above the table.
    """

    def __init__(self, found: Sequence[Entry]) -> None:
        if not found:
            raise ValueError("expected at least one entry for a table, got none")
        groups, columns = _unique(entry.group for entry in found), _unique(entry.column for entry in found)
        columns.sort(key=lambda column: strength(column[0]))
        distinct = len({group[1:] for group in groups}) == len(groups)
        self.blocks = []
        for group in groups:
            members = [entry for entry in found if entry.group == group]
            largest, first = max(entry.n for entry in members), members[0]
            block = []
            for model in _unique(entry.model for entry in members):
                by_column = {entry.column: entry for entry in members if entry.model == model}
                cells = [_shown(by_column.get(column), largest) for column in columns]
                about = [] if distinct else [("report", first.report)]
                about += [("data set", first.dataset + (" (!)" if first.overestimated else ""))]
                about += [("seed", str(first.seed)), ("n", str(largest)), ("wall time", f"{first.wall_s:.0f} s")]
                block.append(([*about, ("model", model)], cells))
            self.blocks.append(block)
        self.head = [*(title for title, _ in self.blocks[0][0][0]), *map(_title, columns)]
        self.notes = ["Accuracy in %, with its 95 % Wilson interval; T3 counts right or flagged."]
        self.notes.append("Bold: above every other model on the same images, with intervals that do not overlap.")
        if any(entry.upper_bound for entry in found):
            self.notes.append("<=: not attacked through its own output, or by reduced attacks only.")
        if any(entry.overestimated for entry in found):
            self.notes.append(f"(!): {OVERESTIMATED}, see the warnings of its report.")


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _title(column: tuple[str, str, str, float]) -> str:
    threat, attack, norm, epsilon = column
    if threat == CLEAN.key:
        return threat
    return f"{threat} {attack}, {budget_text(epsilon, norm)}"


def _shown(entry: Entry | None, largest: int) -> tuple[str, bool]:
    if entry is None:
        return "-", False
    return cell(vars(entry)) + ("" if entry.n == largest else f", n = {entry.n}"), entry.best


def _bold(text: str, best: bool, pattern: str) -> str:
    return pattern.format(text) if best else text
