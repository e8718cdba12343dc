"""The result of an evaluation as data: the rows of report.json, and the criteria that they are held to.

How the text of report.md is written is in ``report_text.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zepad_mm.evaluation.threats import CLEAN, T1, T2, THREATS, WORST, RowKind, strength
from zepad_mm.utils.atomic import complete_folder, replacing_folder
from zepad_mm.utils.io import damage_of, read_json, write_json, write_text
from zepad_mm.utils.text import budget_text, interval_text, percent

JSON, MARKDOWN = "report.json", "report.md"
OVERESTIMATED = "likely overestimated"  # said wherever a diagnostic failed
HELD, UPPER_BOUND, NOT_CHECKED = "held", "upper bound", "not checked"  # the other verdicts on a row under T2


@dataclass(frozen=True)
class Report:
    """What :func:`zepad_mm.evaluate` found, in the form of report.json.

    Attributes:
        meta: commit, config, seed, hardware, versions, wall_s, warnings, diagnostics, certificate, false_alarms.
        rows: one for each model, threat model and attack, and data set; ``worst`` is the per-sample worst case of its
            threat model.
        detection: one for each suspicion score, threat model and attack.
    """

    meta: dict[str, Any]
    rows: list[dict[str, Any]]
    detection: list[dict[str, Any]] = field(default_factory=list)

    # ---- rows ------------------------------------------------------------------------------------------------

    def row(
        self,
        model: str,
        threat: str = CLEAN.key,
        attack: str | None = None,
        dataset: str | None = None,
        epsilon: float | None = None,
    ) -> dict[str, Any]:
        """Return a row by its names.

        Args:
            model: name of the row.
            threat: key of a threat model.
            attack: name of an attack; None is "none" for clean and "worst" else.
            dataset: name of a data set; None takes the first that has the row.
            epsilon: budget, of a threat model with several; None takes the largest.

        Raises:
            KeyError: no such row.
        """
        attack = attack or ("none" if threat == CLEAN.key else WORST)
        for row in self.rows:
            same = (row["model"], row["threat"], row["attack"]) == (model, threat, attack)
            if same and dataset in (None, row.get("dataset")) and epsilon in (None, row.get("epsilon")):
                return row
        raise KeyError(f"no row for {model} under {threat} {attack}; models: {', '.join(self.models)}")

    def accuracy(
        self, model: str, threat: str = CLEAN.key, attack: str | None = None, dataset: str | None = None
    ) -> float:
        """Return an accuracy in [0, 1]; see :meth:`row`."""
        return float(self.row(model, threat, attack, dataset)["accuracy"])

    @property
    def kinds(self) -> dict[str, RowKind]:
        """Name of each model -> kind of its rows: undefended first, then the defence, then what it is compared with."""
        found = {row["model"]: RowKind(row["kind"]) for row in self.rows}
        order = list(RowKind)
        return dict(sorted(found.items(), key=lambda item: order.index(item[1])))

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of :attr:`kinds`."""
        return list(self.kinds)

    def models_of(self, *kinds: RowKind) -> list[str]:
        """Names of the models of these kinds."""
        return [name for name, kind in self.kinds.items() if kind in kinds]

    @property
    def default(self) -> str:
        """Name of the model as it ships; of the first one in a report of several."""
        return self.models_of(RowKind.DEFAULT)[0]

    @property
    def undefended(self) -> str | None:
        """Name of the undefended model; None where there is none."""
        return next(iter(self.models_of(RowKind.UNDEFENDED)), None)

    def best_branch(self, threat: str) -> str | None:
        """Name of the branch with the highest accuracy under a threat model; None without branches."""
        branches = self.models_of(RowKind.BRANCH)
        return max(branches, key=lambda name: self.accuracy(name, threat)) if branches else None

    def counted(self, model: str, threat: str, epsilon: float | None = None) -> list[dict[str, Any]]:
        """Return the rows of the attacks that count for the worst case of a model, at this budget or a smaller one."""
        most = self.row(model, threat)["epsilon"] if epsilon is None else epsilon
        return [
            row
            for row in self.rows
            if row["model"] == model
            and row["threat"] in THREATS[threat].counts
            and row["attack"] != WORST
            and not row.get("control")
            and row["epsilon"] <= most * (1 + 1e-9)
        ]

    def budgets(self, threat: str) -> list[float]:
        """Return the budgets of a threat model, largest first."""
        return sorted({row["epsilon"] for row in self.rows if row["threat"] == threat}, reverse=True)

    @property
    def threats(self) -> list[str]:
        """Keys of the threat models that ran, weakest first."""
        return list(dict.fromkeys(row["threat"] for row in self.rows))

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets."""
        return list(dict.fromkeys(row["dataset"] for row in self.rows))

    @property
    def single(self) -> bool:
        """Whether it is of one model on one data set."""
        return "evaluations" not in self.meta

    def means(self) -> list[dict[str, Any]]:
        """Return the mean accuracy over the data sets of each model, threat model and budget, in the worst case.

        Only where every data set has the row.
        """
        found: dict[tuple[str, str, float], list[float]] = {}
        for row in self.rows:
            if row["attack"] == ("none" if row["threat"] == CLEAN.key else WORST):
                found.setdefault((row["model"], row["threat"], row["epsilon"]), []).append(float(row["accuracy"]))
        sets = len(self.datasets)
        return [
            {"model": model, "threat": threat, "epsilon": epsilon, "datasets": sets, "accuracy": sum(values) / sets}
            for (model, threat, epsilon), values in found.items()
            if len(values) == sets
        ]

    # ---- diagnostics -----------------------------------------------------------------------------------------

    @property
    def failed_checks(self) -> list[dict[str, Any]]:
        """The diagnostics that failed."""
        parts = [self.meta] if self.single else self.meta["evaluations"]
        return [check for part in parts for check in part.get("diagnostics", []) if not check["passed"]]

    @property
    def doubted(self) -> bool:
        """Whether a diagnostic says that robust accuracy is likely overestimated."""
        return bool(self.failed_checks)

    # ---- files -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The form of report.json."""
        return {"meta": self.meta, "rows": self.rows, "detection": self.detection}

    def markdown(self) -> str:
        """Return the text of report.md: tables, a summary in plain words, warnings."""
        from zepad_mm.evaluation.report_text import report_text

        return report_text(self)

    def save(self, folder: str | Path) -> None:
        """Write ``report.json`` and ``report.md`` into ``folder``, which holds both old or both new at any moment."""
        with replacing_folder(folder) as staged:
            write_json(staged / JSON, self.to_dict())
            write_text(staged / MARKDOWN, self.markdown())

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read ``report.json``, given itself or its folder. Raises FileNotFoundError or ValueError."""
        complete_folder(Path(folder) if Path(folder).is_dir() else Path(folder).parent)
        path = Path(folder) / JSON if Path(folder).is_dir() else Path(folder)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected the report of an evaluation")
        values = read_json(path)
        if not isinstance(values, dict) or not {"meta", "rows", "detection"} <= set(values):
            raise ValueError(f"{path} is no report of zepad-mm: expected the keys meta, rows and detection")
        with damage_of(path):
            if not all("kind" in row for row in values["rows"]):
                raise ValueError(
                    f"{path}: expected rows with a kind, which older versions did not write; evaluate again"
                )
            report = cls(values["meta"], values["rows"], values["detection"])
            _ = report.kinds, report.threats, report.datasets  # of entries that every row has
        return report


def merged(evaluations: Mapping[tuple[str, str], Report], meta: dict[str, Any]) -> Report:
    """Return several reports as one, with a row per model and data set.

    Args:
        evaluations: (name of the model, name of the task) -> its report. The row of a model as it ships gets the name
            of the model, its other rows the name before a slash: "general", "general/branch:fare". The data set of
            each row is the name of the task.
        meta: of the whole; what belongs to one evaluation goes to its list ``evaluations``.
    """
    rows, detection, parts, warnings = [], [], [], []
    for (model, task), report in evaluations.items():
        rows += [_renamed(row, report.default, model, task) for row in report.rows]
        detection += [_renamed(row, report.default, model, task) for row in report.detection]
        parts.append({"model": model, "task": task, **report.meta})
        warnings += [f"{model} on {task}: {text}" for text in report.meta["warnings"]]
    return Report({**meta, "warnings": warnings, "evaluations": parts}, rows, detection)


def joined(reports: Sequence[Report], meta: dict[str, Any]) -> Report:
    """Return studies of the same models, on other data sets or at other budgets, as one report.

    Clean rows that several of them hold are kept once.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    keys = ("dataset", "model", "threat", "attack", "norm", "epsilon")
    for report in reports:
        for row in report.rows:
            rows.setdefault(tuple(row[key] for key in keys), row)
    return Report(
        {
            **meta,
            "warnings": [text for report in reports for text in report.meta["warnings"]],
            "evaluations": [part for report in reports for part in report.meta["evaluations"]],
        },
        list(rows.values()),
        [row for report in reports for row in report.detection],
    )


def _renamed(row: dict[str, Any], default: str, model: str, task: str) -> dict[str, Any]:
    name = model if row["model"] == default else f"{model}/{row['model']}"
    return {**row, "model": name, "dataset": task}


def acceptance(report: Report) -> list[str]:
    """Return the criteria of this project's demo that a report fails, in words; of the threats that ran.

    Criteria compare a defence with the undefended model, so that other reports pass.
    """
    failures: list[str] = []
    undefended, default = report.undefended, report.default
    if undefended is None:
        return failures
    clean, base = report.accuracy(default), report.accuracy(undefended)
    if clean < base - 0.01:
        failures.append(f"{default} is {100 * (base - clean):.1f} points below undefended on clean images (at most 1)")
    if T1.key in report.threats:
        before, after = report.accuracy(undefended, T1.key), report.accuracy(default, T1.key)
        if before > 0.6 * base:
            failures.append(
                f"T1 leaves the undefended model {percent(before / base if base else 0.0)} % of its clean accuracy "
                "(at most 60): the attack is weak"
            )
        if after < before + 0.15:
            gain = 100 * (after - before)
            failures.append(f"under T1 {default} gains {gain:.1f} points over undefended (at least 15)")
    branch = report.best_branch(T2.key) if T2.key in report.threats else None
    if branch is not None:
        held, best = report.accuracy(default, T2.key), report.accuracy(branch, T2.key)
        if held < best - 0.02:
            failures.append(f"under T2 {default} is {100 * (best - held):.1f} points below its best branch (at most 2)")
    return failures


def by_strength(report: Report) -> list[str]:
    """Keys of the threat models of a report that attack, from weak to strong."""
    return sorted((threat for threat in report.threats if threat != CLEAN.key), key=strength)


def budget_of(row: Mapping[str, Any]) -> str:
    """Return a row's budget as every table and plot shows it."""
    return budget_text(row["epsilon"], row["norm"])


def is_upper_bound(row: Mapping[str, Any]) -> bool:
    """Whether a robust accuracy may well be lower: no attack through the row itself, or reduced attacks."""
    return bool(row.get("upper_bound")) or row.get("strength") == "reduced"


def cell(row: Mapping[str, Any]) -> str:
    """Return a row's accuracy with its interval as every table shows it."""
    at_most = "<= " if is_upper_bound(row) else ""
    return at_most + interval_text(row["accuracy"], row["ci_low"], row["ci_high"])
