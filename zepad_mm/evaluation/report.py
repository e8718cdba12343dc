"""The outcome: rows that programs read (report.json), tables and plain words that people read (report.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.validation import budget_text

JSON, MARKDOWN = "report.json", "report.md"
TITLES = {
    "T1": "T1: one perturbation made on the public encoder",
    "T1p": "T1p: one patch for all pictures, made on the public encoder",
    "T1b": "T1b: one perturbation made on the defence's own encoders",
    "T2": "T2: white box, everything known to the attacker",
    "T3": "T3: white box that also evades the detector",
}


CONTROLS = ("random_noise", "random_patch")  # no attacks: what an attack must beat


@dataclass(frozen=True)
class Report:
    """What :func:`zepad_mm.evaluate` found, in the form of report.json.

    Attributes:
        meta: commit, config, seed, hardware, versions, wall_s, warnings, diagnostics, certificate, false_alarms.
        rows: one for each model, threat and attack; ``worst`` is the per-sample worst case of its threat.
        detection: one for each score, threat and attack.
    """

    meta: dict[str, Any]
    rows: list[dict[str, Any]]
    detection: list[dict[str, Any]] = field(default_factory=list)

    def row(self, model: str, threat: str = "clean", attack: str | None = None) -> dict[str, Any]:
        """A row by its names; the attack defaults to "none" for clean and "worst" else. KeyError when not run."""
        attack = attack or ("none" if threat == "clean" else "worst")
        for row in self.rows:
            if (row["model"], row["threat"], row["attack"]) == (model, threat, attack):
                return row
        raise KeyError(f"no row for {model} under {threat} {attack}; models: {', '.join(self.models)}")

    def accuracy(self, model: str, threat: str = "clean", attack: str | None = None) -> float:
        """Accuracy in [0, 1]; see :meth:`row`."""
        return float(self.row(model, threat, attack)["accuracy"])

    @property
    def models(self) -> list[str]:
        """All models, undefended first, then the defence, then what it is compared with."""
        names = list(dict.fromkeys(row["model"] for row in self.rows))
        order = ("undefended", "zepad", "branch:", "baseline:", "zepad:")
        return sorted(names, key=lambda name: next((i for i, start in enumerate(order) if _is(name, start)), 9))

    @property
    def threats(self) -> list[str]:
        """The threats that ran, weakest first."""
        return list(dict.fromkeys(row["threat"] for row in self.rows))

    @property
    def doubted(self) -> bool:
        """Whether the evaluation's own checks found the robustness likely overestimated."""
        return any(text.startswith("likely overestimated") for text in self.meta["warnings"])

    def to_dict(self) -> dict[str, Any]:
        """The form of report.json."""
        return {"meta": self.meta, "rows": self.rows, "detection": self.detection}

    def save(self, folder: str | Path) -> None:
        """Write ``report.json`` and ``report.md`` into ``folder``."""
        write_json(Path(folder) / JSON, self.to_dict())
        write_text(Path(folder) / MARKDOWN, self.markdown())

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read ``report.json``, given itself or its folder. Raises FileNotFoundError or ValueError."""
        path = Path(folder) / JSON if Path(folder).is_dir() else Path(folder)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected the report of an evaluation")
        values = read_json(path)
        if not isinstance(values, dict) or not {"meta", "rows", "detection"} <= set(values):
            raise ValueError(f"{path} is no report of zepad-mm: expected the keys meta, rows and detection")
        return cls(values["meta"], values["rows"], values["detection"])

    def markdown(self) -> str:
        """The report for people: one table per threat, detection, plain words, warnings."""
        first = self.rows[0]
        parts = [
            f"# Robustness on {first['dataset']}, {first['n']} pictures"
            + (" (likely overestimated: see the warnings)" if self.doubted else "")
        ]
        parts.append(
            "Accuracy in %, with its 95 % Wilson interval. `worst`: a picture counts only if it is answered right "
            "without an attack and under every attack of that threat. `<=`: not attacked through its own output, since "
            "the others' examples put it below the default already."
        )
        parts += [self._table(threat) for threat in self.threats if threat in ("T1", "T1p", "T1b", "T2")]
        if self.threats == ["clean"]:
            parts.append(
                markdown_table(["model", "clean"], [[f"`{name}`", cell(self.row(name))] for name in self.models])
            )
        if self.detection:
            parts.append(self._detection_table())
        if self.meta.get("false_alarms"):
            parts.append(self._false_alarm_table())
        parts.append("## In plain words\n\n" + "\n".join(f"- {line}" for line in self.words()))
        if self.meta["warnings"]:
            parts.append("## Warnings\n\n" + "\n".join(f"- {text}" for text in self.meta["warnings"]))
        meta = self.meta
        parts.append(
            f"Commit {meta['commit']}, seed {meta['seed']}, {meta['hardware']}, {meta['wall_s']:.0f} s. "
            "All of it is in `report.json`; every single answer is in `records.parquet`."
        )
        return "\n\n".join(parts) + "\n"

    def _table(self, threat: str) -> str:
        attacks = list(dict.fromkeys(row["attack"] for row in self.rows if row["threat"] == threat))
        shown = ["worst"] if threat == "T2" else [name for name in attacks if name not in CONTROLS]
        shown = [*(name for name in attacks if name in CONTROLS), *shown]
        lines = []
        for name in self.models:
            cells = [cell(self.row(name)), *(cell(self.row(name, threat, attack)) for attack in shown)]
            lines.append([f"`{name}`", *cells])
            if threat == "T2":
                lowest = min(
                    (row for row in self.rows if row["threat"] == "T2" and row["model"] == name and row["attacked"]),
                    key=lambda row: (row["attack"] == "worst", row["accuracy"]),
                )
                lines[-1].append(f"{percent(lowest['accuracy'])} `{lowest['attack']}`")
        head = ["model", "clean", *(attack.replace("_", " ") for attack in shown)]
        head += ["strongest single attack"] if threat == "T2" else []
        return f"## {TITLES[threat]} ({budget_of(self.row('zepad', threat))})\n\n" + markdown_table(head, lines)

    def _detection_table(self) -> str:
        lines = [
            [
                f"`{row['score']}`",
                f"{row['threat']} {row['attack']}",
                f"{row['auroc']:.3f}",
                percent(row["tpr_at_fpr1"]),
                f"{percent(row['tpr_at_fpr5'])} ({percent(row['fpr_at_fpr5'])})",
                "-" if row["accuracy_paper_rule"] is None else percent(row["accuracy_paper_rule"]),
                str(row["n"]),
            ]
            for row in self.detection
            if row["threat"] != "T1b"
        ]
        if not lines:
            return ""
        head = ["score", "attack", "AUROC", "TPR at 1 % FPR", "at 5 % (FPR paid)", "paper's rule", "n"]
        note = "Thresholds come from clean validation pictures. T2 and T3 hold the attacker's "
        note += (
            "successes alone; in `worst` he shows the least suspicious of them, in T3 after aiming at the detector too."
        )
        return f"## Detection (advisory)\n\n{note}\n\n" + markdown_table(head, lines)

    def _false_alarm_table(self) -> str:
        found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
        for row in self.meta["false_alarms"]:
            found.setdefault((row["name"], row["severity"]), []).append(row)
        lines = []
        for (name, severity), rows in found.items():
            first = rows[0]
            title = "clean" if first["kind"] == "clean" else f"`{name}`" + (f" {severity}" if severity else "")
            right = "-" if first["accuracy"] is None else interval(first["accuracy"], *first["accuracy_ci"])
            flagged = [f"{percent(row['flagged_at_fpr1'])} / {percent(row['flagged_at_fpr5'])}" for row in rows]
            lines.append([title, right, *flagged, str(first["n"])])
        head = ["pictures", "accuracy", *(f"`{row['score']}`" for row in next(iter(found.values()))), "n"]
        note = "Share of pictures flagged though nobody attacked them, in %, at the thresholds that 1 % / 5 % of clean "
        note += "validation pictures exceed. Corruptions with their severity, 1 to 5; the others show no class at all."
        return f"## False alarms\n\n{note}\n\n" + markdown_table(head, lines)

    def words(self) -> list[str]:
        """Short sentences, written from the figures alone: what was won, and what an attacker still does."""
        clean, base = self.accuracy("zepad"), self.accuracy("undefended")
        lines = [f"Without an attack: {percent(clean)} % with the defence, {percent(base)} % without it."]
        for threat, who in (
            ("T1", "An attacker who knows only the public encoder"),
            ("T1p", "One who puts one patch on every picture, made on the public encoder,"),
            ("T1b", "One who also owns the defence's encoders, but makes one perturbation for all pictures,"),
            ("T2", "One who knows everything and attacks each picture"),
        ):
            if threat not in self.threats:
                continue
            row, before = self.row("zepad", threat), self.accuracy("undefended", threat)
            lines.append(
                f"{who} (at {budget_of(row)}) leaves {percent(row['accuracy'])} % with the defence, "
                f"{percent(before)} % without it"
                + (
                    "."
                    if row["asr_correct"] is None
                    else f": {percent(row['asr_correct'])} % of the right answers are lost."
                )
            )
        if "T2" in self.threats:
            name, best = max(
                ((name, self.accuracy(name, "T2")) for name in self.models if name.startswith("branch:")),
                key=lambda pair: pair[1],
            )
            gap = self.accuracy("zepad", "T2") - best
            verdict = "gains" if gap > 0.005 else "loses" if gap < -0.005 else "neither gains nor loses"
            size = f" {abs(100 * gap):.1f} points" if abs(gap) > 0.005 else ""
            lines.append(
                f"Against him the fusion {verdict}{size} beside its best branch `{name}` ({percent(best)} %, "
                f"{percent(self.accuracy(name))} % without an attack)."
            )
        if self.meta.get("certificate"):
            shares = " and ".join(
                f"{percent(share)} % {'without an attack' if threat == 'clean' else 'against all examples of T2'}"
                for threat, share in self.meta["certificate"].items()
            )
            lines.append(f"Right, and certified so whatever the benign branch might say: {shares}.")
        if "T3" in self.threats:
            held, cost = self.accuracy("zepad", "T3"), self.accuracy("zepad", "T3", "none")
            lines.append(
                f"With a detector that the attacker knows, {percent(held)} % end right or flagged; without an attack "
                f"{percent(cost)} % are right and not flagged."
            )
        if "T2" not in self.threats:
            lines.append("No white-box attack was run: nothing here says that the defence withstands one.")
        return lines


def acceptance(report: Report) -> list[str]:
    """Which of the project's own criteria this report fails, in words; those whose threat did not run are left out."""
    failures = []
    clean, base = report.accuracy("zepad"), report.accuracy("undefended")
    if clean < base - 0.01:
        failures.append(f"zepad is {100 * (base - clean):.1f} points below undefended on clean pictures (at most 1)")
    if "T1" in report.threats:
        before, after = report.accuracy("undefended", "T1"), report.accuracy("zepad", "T1")
        if before > 0.6 * base:
            failures.append(
                f"T1 leaves the undefended model {percent(before / base if base else 0.0)} % of its clean accuracy "
                "(at most 60): the attack is weak"
            )
        if after < before + 0.15:
            failures.append(f"under T1 zepad gains {100 * (after - before):.1f} points over undefended (at least 15)")
    if "T2" in report.threats:
        held = report.accuracy("zepad", "T2")
        best = max(report.accuracy(name, "T2") for name in report.models if name.startswith("branch:"))
        if held < best - 0.02:
            failures.append(f"under T2 zepad is {100 * (best - held):.1f} points below its best branch (at most 2)")
    return failures


def _is(name: str, start: str) -> bool:
    return name.startswith(start) if start.endswith(":") else name == start


def percent(share: float) -> str:
    """A share in [0, 1] in %, without the sign."""
    return f"{100 * share:.1f}"


def budget_of(row: Mapping[str, Any]) -> str:
    """A row's budget, as every table and figure shows it."""
    return budget_text(row["epsilon"], row["norm"])


def cell(row: Mapping[str, Any]) -> str:
    """A row's accuracy with its interval, as every table shows it."""
    at_most = "<= " if row.get("upper_bound") else ""
    return at_most + interval(row["accuracy"], row["ci_low"], row["ci_high"])


def interval(share: float, low: float, high: float) -> str:
    """A share and its interval in %: "43.1 (40.2-46.0)"."""
    return f"{percent(share)} ({percent(low)}-{percent(high)})"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text."""
    widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, rule, *lines)
    )
