"""The text of report.md: plain words and warnings, then one table per threat model, and detection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zepad_mm.evaluation.report import (
    HELD,
    NOT_CHECKED,
    OVERESTIMATED,
    UPPER_BOUND,
    Report,
    budget_of,
    by_strength,
    cell,
)
from zepad_mm.evaluation.threats import CLEAN, MODEL, T1, T1B, T1I, T2, T3, THREATS, WORST, strength
from zepad_mm.utils.text import budget_text, bullets, interval_text, markdown_table, percent

NOTE = (
    "Accuracy in %, with its 95 % Wilson interval. `worst`: an image counts only if it is answered right without an "
    "attack and under every attack of that threat model. `<=`: not attacked through its own output, since the attacks "
    "on others put it below the default already, or by reduced attacks only."
)
NAMES = (
    "`undefended` is the public encoder, `branch:NAME` one encoder of the defence alone, `baseline:equal` the mean of "
    "the answers of all its encoders, `MODEL:RULE` the defence under another fusion rule. "
)
MADE_ON = "`ATTACK@MODEL`: an attack, and the model that it was made on."
VERDICTS = (
    f"The verdict is on the attack, not on the model: `{HELD}`, no check found the attack too weak, so that the number "
    f"stands, high or low; `{OVERESTIMATED}`, a stronger attack took more; `{UPPER_BOUND}`, the attack on this row was "
    f"not run at full strength; `{NOT_CHECKED}`, no check was run."
)
BUDGETS = "A budget such as 4/255 means that no pixel changes by more than 4 of 255 levels."
REDUCED = "reduced attacks, so that accuracies are upper bounds"
TOLERANCE = 0.005  # differences of accuracy below it are called none


def report_text(report: Report) -> str:
    """Return the report as Markdown."""
    doubt = f" ({OVERESTIMATED}: see the warnings)" if report.doubted else ""
    if not report.single:
        return _study_text(report, doubt)
    first, meta = report.rows[0], report.meta
    parts = [
        f"# Robustness on {first['dataset']}, {first['n']} images{doubt}",
        *plain_words(report),
        f"## Tables\n\n{NOTE}{_evaluated(report)}\n\n{NAMES if len(report.models) > 1 else ''}{MADE_ON}",
    ]
    parts += [table for threat in by_strength(report) for table in _threat_tables(report, threat)]
    if report.threats == [CLEAN.key]:
        lines = [[f"`{name}`", cell(report.row(name))] for name in report.models]
        parts.append(markdown_table(["model", "clean"], lines))
    parts += _detection_table(report)
    parts += _false_alarm_table(report)
    parts.append(
        f"Commit {meta['commit']}, seed {meta['seed']}, {meta['hardware']}, {meta['wall_s']:.0f} s. "
        "All rows are in `report.json`; the answer on every image is in `records.parquet`."
    )
    return "\n\n".join(parts) + "\n"


def _evaluated(report: Report) -> str:
    """What the row is that is named after no model."""
    source = report.meta.get("config", {}).get("model", {}).get("source")
    return f" Row `{MODEL}`: `{source}` as it is." if report.default == MODEL and source else ""


def plain_words(report: Report) -> list[str]:
    """Return what comes before all tables: what holds, what to beware of, and each attacker in a sentence."""
    parts = [*([BUDGETS] if _has_linf(report) else []), bullets(first_screen(report))]
    if report.meta["warnings"]:
        parts.append("## Warnings\n\n" + bullets(report.meta["warnings"]))
    return [*parts, "## In plain words\n\n" + bullets(summary(report))]


def _has_linf(report: Report) -> bool:
    return any(row["norm"] == "linf" and row["threat"] != CLEAN.key for row in report.rows)


def first_screen(report: Report) -> list[str]:
    """Return four sentences: what holds without an attack, against two attackers, and how sure that is."""
    clean, default = report.row(report.default), report.default
    sentences = [f"Without an attack {_kept(report, CLEAN.key, clean)} of {clean['n']} images are answered right."]
    public = [key for key in (T1.key, T1I.key) if key in report.threats]
    if public:
        kept = [_kept(report, key, strongest_single(report, default, key)) for key in public]
        shape = {
            T1.key: "the strongest universal perturbation ({})",
            T1I.key: "the strongest attack on each image ({})",
        }
        against = [f"{text} under {shape[key].format(key)}" for key, text in zip(public, kept, strict=True)]
        sentences.append(f"Against an attacker who has only the public encoder, {' and '.join(against)} stay right.")
    else:
        sentences.append("No attack from the public encoder was run.")
    if T2.key in report.threats:
        kept_white = _kept(report, T2.key, report.row(default, T2.key))
        sentences.append(f"Against an attacker who knows everything (T2), {kept_white} stay right.")
    else:
        sentences.append("No white-box attack was run, so nothing here says what holds against one.")
    failed = len(report.failed_checks)
    weak = T2.key in report.threats and report.row(default, T2.key).get("strength") == "reduced"
    if failed or weak:
        reasons = [f"{failed} diagnostic{'s' * (failed > 1)} failed"] * bool(failed) + [REDUCED] * weak
        sentences.append(f"These shares are {OVERESTIMATED}: {' and '.join(reasons)}.")
    elif report.meta.get("diagnostics"):
        sentences.append("No diagnostic found these attacks too weak; stronger ones may still exist.")
    else:
        sentences.append("No diagnostic was run, so stronger attacks may exist.")
    return sentences


def _kept(report: Report, threat: str, row: Mapping[str, Any]) -> str:
    """The share of a row with its budget, and that of the undefended model under its own strongest attack."""
    notes = [] if threat == CLEAN.key else [f"at {budget_of(row)}, {row['n']} images"]
    if report.undefended is not None:
        single = row["attack"] not in ("none", WORST)
        other = strongest_single if single else Report.row
        notes.append(f"{percent(other(report, report.undefended, threat)['accuracy'])} % undefended")
    return f"{percent(row['accuracy'])} %" + (f" ({'; '.join(notes)})" if notes else "")


def _study_text(report: Report, doubt: str) -> str:
    """Several models or tasks: one table over all of them."""
    from zepad_mm.evaluation.tables import as_markdown, entries

    parts = [f"# Robustness of {len(report.meta['evaluations'])} evaluations{doubt}"]
    parts += _means_table(report)
    parts.append(as_markdown(entries({"study": report})).rstrip())
    if report.meta["warnings"]:
        parts.append("## Warnings\n\n" + bullets(report.meta["warnings"]))
    return "\n\n".join(parts) + "\n"


def _means_table(report: Report) -> Iterator[str]:
    """Of a suite: the mean over its data sets, one column for each budget."""
    suite = report.meta.get("suite")
    if not suite or not suite["means"]:
        return
    columns = sorted({(strength(row["threat"]), row["epsilon"], row["threat"]) for row in suite["means"]})
    values = {(row["model"], row["threat"], row["epsilon"]): row["accuracy"] for row in suite["means"]}
    lines = []
    for name in dict.fromkeys(row["model"] for row in suite["means"]):
        shares = [values.get((name, key, size)) for _, size, key in columns]
        lines.append([f"`{name}`", *("-" if share is None else percent(share) for share in shares)])
    head = ["model", *(key if key == CLEAN.key else f"{key} {budget_text(size, 'linf')}" for _, size, key in columns)]
    count = suite["means"][0]["datasets"]
    yield f"Mean accuracy in % over {count} data sets ({suite['about']}).\n\n" + markdown_table(head, lines)


def _threat_tables(report: Report, threat: str) -> Iterator[str]:
    """A table for each budget of a threat model."""
    model = THREATS[threat]
    for epsilon in report.budgets(threat) if not model.flagged_is_right else ():
        yield _threat_table(report, threat, epsilon)


def _threat_table(report: Report, threat: str, epsilon: float) -> str:
    rows = [row for row in report.rows if (row["threat"], row["epsilon"]) == (threat, epsilon)]
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    controls = list(dict.fromkeys(row["attack"] for row in rows if row.get("control")))
    many = threat == T2.key  # too many attacks for a column each
    shown = [*controls, *([WORST] if many else [name for name in attacks if name not in controls])]
    judged = many and any("verdict" in row for row in rows)
    lines = []
    for name in report.models:
        found = [report.row(name, threat, attack, epsilon=epsilon) for attack in shown]
        lines.append([f"`{name}`", cell(report.row(name)), *map(cell, found)])
        if many:
            lowest = min(
                (row for row in rows if row["model"] == name and row.get("attacked", True)),
                key=lambda row: (row["attack"] == WORST, row["accuracy"]),
            )
            lines[-1].append(f"{percent(lowest['accuracy'])} `{lowest['attack']}`")
        if judged:
            lines[-1].append(found[-1].get("verdict", ""))
    head = ["model", "clean", *(attack.replace("_", " ") for attack in shown)]
    head += ["strongest single attack"] if many else []
    head += ["verdict"] if judged else []
    worst, clean = report.row(report.default, threat, epsilon=epsilon), report.row(report.default)
    images = "" if worst["n"] == clean["n"] else f", the first {worst['n']} images"
    weak = f", {REDUCED}" if worst.get("strength") == "reduced" else ""
    title = f"## {THREATS[threat].title}{weak} ({budget_of(worst)}{images})"
    notes = [*([VERDICTS] if judged else []), *_seen_note(report, threat)]
    return "\n\n".join([title, markdown_table(head, lines), *notes])


def _seen_note(report: Report, threat: str) -> Iterator[str]:
    """Which kinds of attacks the gate was trained on, where the model has one and they are not the white-box ones."""
    rows = [row for row in report.rows if row["threat"] == threat and row["model"] == report.default and "seen" in row]
    if not rows or threat == T2.key:
        return
    kinds = {row["algorithm"]: row["seen"] for row in rows}
    seen, new = (", ".join(f"`{kind}`" for kind in kinds if kinds[kind] is known) or "none" for known in (True, False))
    yield f"Kinds of attacks that the gate was trained on: {seen}; held out from its training: {new}."


OPERATING_POINTS = ("caught at nominal 1 % (paid)", "at nominal 5 % (paid)", "at a real 1 % / 5 %")


def operating_points(row: Mapping[str, Any]) -> list[str]:
    """Return the cells under ``OPERATING_POINTS`` for a detection row."""
    nominal = [f"{percent(row[f'tpr_at_fpr{rate}'])} ({percent(row[f'fpr_at_fpr{rate}'])})" for rate in (1, 5)]
    real = [row.get(f"tpr_at_real_fpr{rate}") for rate in (1, 5)]
    return [*nominal, " / ".join("-" if value is None else percent(value) for value in real)]


def _detection_table(report: Report) -> Iterator[str]:
    lines = [
        [
            f"`{row['score']}`",
            f"{row['threat']} {row['attack']}",
            f"{row['auroc']:.3f}",
            *operating_points(row),
            "-" if row["accuracy_paper_rule"] is None else percent(row["accuracy_paper_rule"]),
            str(row["n"]),
        ]
        for row in report.detection
        if row["threat"] != T1B.key
    ]
    if not lines:
        return
    head = ["score", "attack", "AUROC", *OPERATING_POINTS, "paper's rule", "n"]
    note = (
        "Share of attacked images caught, in %. AUROC: the probability that an attacked image gets a higher score than "
        "a clean one; 0.5 is chance. Nominal thresholds are exceeded by 1 % and 5 % of clean validation images; in "
        "brackets the false alarms that they really raise on the clean test images. Real thresholds are exceeded by "
        "1 % and 5 % of the clean test images. T2 and T3 hold successful attacks only: `first_success` shows the first "
        "one found on each image, `worst` the least suspicious one, for T3 after attacking the detector too. Paper's "
        "rule: the share of clean and attacked images that ZePAD's published threshold tells apart."
    )
    yield f"## Detection (advisory)\n\n{note}\n\n" + markdown_table(head, lines)


def _false_alarm_table(report: Report) -> Iterator[str]:
    found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in report.meta.get("false_alarms") or []:
        found.setdefault((row["name"], row["severity"]), []).append(row)
    if not found:
        return
    lines = []
    for (name, severity), rows in found.items():
        first = rows[0]
        title = "clean" if first["kind"] == "clean" else f"`{name}`" + (f" {severity}" if severity else "")
        right = "-" if first["accuracy"] is None else interval_text(first["accuracy"], *first["accuracy_ci"])
        flagged = [f"{percent(row['flagged_at_fpr1'])} / {percent(row['flagged_at_fpr5'])}" for row in rows]
        lines.append([title, right, *flagged, str(first["n"])])
    head = ["images", "accuracy", *(f"`{row['score']}`" for row in next(iter(found.values()))), "n"]
    note = (
        "Share of images flagged without an attack, in %, at the thresholds that 1 % / 5 % of clean validation images "
        "exceed. Corruptions are given with their severity, 1 to 5; the other images show no class at all."
    )
    yield f"## False alarms\n\n{note}\n\n" + markdown_table(head, lines)


def summary(report: Report) -> list[str]:
    """Return short sentences written from the rows alone: what the defence gains, and what an attacker still does."""
    default = report.default
    compared = _with_and_without(report) or f"{percent(report.accuracy(default))} % of the answers are right"
    lines = [f"Without an attack: {compared}."]
    lines += [_under_attack(report, threat) for threat in by_strength(report) if not THREATS[threat].default_only]
    if T2.key in report.threats:
        lines += _against_best_branch(report)
    if report.meta.get("certificate"):
        shares = " and ".join(
            f"{percent(share)} % {'without an attack' if threat == CLEAN.key else 'against all T2 examples'}"
            for threat, share in report.meta["certificate"].items()
        )
        lines.append(f"Certified, which means right whatever the benign branches answer: {shares}.")
    if T3.key in report.threats:
        held, cost = report.accuracy(default, T3.key), report.accuracy(default, T3.key, "none")
        lines.append(
            f"With a detector that the attacker knows, {percent(held)} % end right or flagged; without an attack "
            f"{percent(cost)} % are right and not flagged."
        )
    if T2.key not in report.threats:
        lines.append("No white-box attack was run: nothing here says that the model is robust to one.")
    return lines


def _under_attack(report: Report, threat: str) -> str:
    """One sentence on the worst case, with the number of attacks that it is over; one on the strongest single one."""
    row, model = report.row(report.default, threat), THREATS[threat]
    counted = report.counted(report.default, threat)
    one, many = ("perturbation", "perturbations") if model.universal else ("attack", "attacks")
    over = f"one {one}" if len(counted) == 1 else f"the worst case per image over {len(counted) or 'all'} {many}"
    compared = _with_and_without(report, threat) or f"{percent(row['accuracy'])} % of the answers right"
    lost = row.get("asr_correct")
    end = "." if lost is None else f": {percent(lost)} % of the right answers are lost."
    images = "" if row["n"] == report.row(report.default)["n"] else f", {row['n']} images"
    text = f"{model.attacker} (at {budget_of(row)}{images}) leaves {compared} in {over}{end}"
    text = text.replace(" in one ", " with one ")
    if row.get("strength") == "reduced":
        text += f" This is no T2 at full strength: {REDUCED}."
    if len(counted) < 2 or not model.universal:
        return text
    single = strongest_single(report, report.default, threat)
    both = f"{percent(single['accuracy'])} % (`{single['attack']}`)"
    if report.undefended is not None:
        without = strongest_single(report, report.undefended, threat)
        both = f"{percent(single['accuracy'])} % with the defence (`{single['attack']}`)"
        both += f" and {percent(without['accuracy'])} % without it (`{without['attack']}`)"
    return f"{text} The strongest single one leaves {both}."


def strongest_single(report: Report, model: str, threat: str) -> dict[str, Any]:
    """Return the row of the one attack that leaves a model the lowest accuracy under a threat model."""
    counted = report.counted(model, threat) or [report.row(model, threat)]  # a shortened report has the worst case only
    return min(counted, key=lambda row: row["accuracy"])


def _with_and_without(report: Report, threat: str = CLEAN.key) -> str:
    """Return the accuracy with the defence and without it; empty for a model without an undefended row."""
    if report.undefended is None:
        return ""
    accuracies = report.accuracy(report.default, threat), report.accuracy(report.undefended, threat)
    return "{} % right with the defence, {} % without it".format(*map(percent, accuracies))


def _against_best_branch(report: Report) -> Iterator[str]:
    branch = report.best_branch(T2.key)
    if branch is None:
        return
    best = report.accuracy(branch, T2.key)
    gap = report.accuracy(report.default, T2.key) - best
    verdict = "as good as"
    if abs(gap) > TOLERANCE:
        verdict = f"{abs(100 * gap):.1f} points {'above' if gap > 0 else 'below'}"
    yield (
        f"Under the white-box attack the fusion is {verdict} its best branch `{branch}` ({percent(best)} %, "
        f"{percent(report.accuracy(branch))} % without an attack)."
    )
