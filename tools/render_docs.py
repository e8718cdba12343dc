#!/usr/bin/env python
"""Write the tables of both READMEs and the shipped model's card from committed results: no figure is typed by hand.

    scripts/demo --out results/demo && python -m tools.render_docs

``--check`` changes nothing and exits with 1 when one of them is not what the report says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tools.recipes_readme import recipes_readme
from zepad_mm.evaluation.model_card import model_card
from zepad_mm.evaluation.report import Report
from zepad_mm.models.serialization import CONFIG, EMBEDDED_MODEL, PLACEHOLDER, ZePADConfig
from zepad_mm.utils.io import read_json, write_text

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "results" / "demo" / "report.json"
ABROAD = ROOT / "results" / "clip.json"
GENERAL_REPORT = ROOT / "results" / "general" / "report.json"
GENERAL = "recipes/models/general"
THREATS = ("clean", "T1", "T2")
START = "<!-- table: written by tools/render_docs.py from results/demo/report.json -->"
END = "<!-- /table -->"
COLUMNS = (("clean", "clean"), ("T1", "T1, 10/255"), ("T1b", "T1b, 10/255"), ("T2", "T2, {epsilon}/255"))


def accuracy(report: dict[str, Any], model: str, threat: str) -> dict[str, Any]:
    """The row of a model under a threat: its per-sample worst case, or clean."""
    rows = [row for row in report["rows"] if row["model"] == model and row["threat"] == threat]
    rows = [row for row in rows if threat == "clean" or row["attack"] == "worst"]
    if len(rows) != 1:
        raise SystemExit(f"{REPORT} has {len(rows)} rows of {model} under {threat}, expected one")
    return rows[0]


def percent(row: dict[str, Any]) -> str:
    half = 50 * (row["ci_high"] - row["ci_low"])
    return f"{'≤ ' if row.get('upper_bound') else ''}{100 * row['accuracy']:.1f} ± {half:.1f}"


def table(report: dict[str, Any]) -> str:
    """The whole block between the two marks."""
    config = report["meta"]["config"]["model"]
    models = {"undefended": "undefended CLIP"}
    models |= {f"branch:{b['name']}": f"branch {b['name']} alone ({b['objective']})" for b in config["branches"]}
    models |= {
        "baseline:equal": "equal-weight ensemble of the branches",
        "zepad:rfdm": "ZePAD, the paper's rule (RFDM)",
    }
    models |= {"zepad": f"**ZePAD, default rule** (`{config['fusion']}`)"}
    threats = [(threat, title) for threat, title in COLUMNS if any(r["threat"] == threat for r in report["rows"])]
    two = accuracy(report, "zepad", "T2")
    head = " | ".join(title.format(epsilon=f"{255 * two['epsilon']:.0f}") for _, title in threats)
    lines = [f"| accuracy in %, ± half a 95 % interval | {head} |", "|---|" + "---|" * len(threats)]
    for model, title in models.items():
        if any(row["model"] == model for row in report["rows"]):
            lines.append(f"| {title} | " + " | ".join(percent(accuracy(report, model, t)) for t, _ in threats) + " |")
    return "\n".join([*lines, "", *words(report), *detection(report), *caveats(report)])


def words(report: dict[str, Any]) -> list[str]:
    """What the figures mean, with the white-box attacker first."""
    clean, two = accuracy(report, "zepad", "clean"), accuracy(report, "zepad", "T2")
    plain, one, open_one = (
        accuracy(report, "undefended", "clean"), accuracy(report, "zepad", "T1"), accuracy(report, "undefended", "T1")
    )  # fmt: skip
    paper = accuracy(report, "zepad:rfdm", "T2")
    at_most = "at most " if paper["upper_bound"] else ""
    lost = 1 - two["accuracy"] / clean["accuracy"]
    n, meta = clean["n"], report["meta"]
    return [
        f"n = {n} clothing photos that no training and no choice has seen, zero-shot over ten names, one seed, the "
        "small embedded CLIP; every cell is the worst case per picture over all attacks of its column.",
        "",
        f"**A white-box attacker still wins often**: knowing everything and changing no pixel by more than "
        f"{255 * two['epsilon']:.0f}/255, he takes {100 * lost:.0f} % of the answers that ZePAD gets right on clean "
        f"pictures ({100 * clean['accuracy']:.1f} to {100 * two['accuracy']:.1f} %). Against one perturbation made on "
        f"the public encoder the undefended CLIP falls from {100 * plain['accuracy']:.1f} to "
        f"{100 * open_one['accuracy']:.1f} %, ZePAD to {100 * one['accuracy']:.1f} %. The default rule is not the "
        f"paper's: under the same attacker the paper's rule keeps {at_most}{100 * paper['accuracy']:.1f} %. The "
        "rule was chosen on validation pictures (`zepad_mm/assets/zepad/build.json`).",
        "",
        f"Measured by `scripts/demo` at commit {meta['commit']} in {meta['wall_s'] / 60:.1f} minutes, on "
        f"{meta['hardware']}.",
    ]


def detection(report: dict[str, Any]) -> list[str]:
    """Detection in one table: plain and adaptive, the paper's score and the deployed one."""
    deployed = report["meta"]["config"]["model"]["detector"]["score"]
    wanted = {"confidence_gap": "the paper's gap", deployed: f"`{deployed}`"}
    rows = [row for row in report["detection"] if row["score"] in wanted and row["model"] == "zepad"]
    if not rows:
        return []
    lines = ["", "Detection is advisory: an attacker who aims at the detector too gets past it.", ""]
    lines += [
        "| score | threat | attack | AUROC | caught at 1 % / 5 % false alarms | paper's rule |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {wanted[row['score']]} | {row['threat']} | {row['attack']} | {row['auroc']:.2f} | "
            f"{100 * row['tpr_at_fpr1']:.0f} / {100 * row['tpr_at_fpr5']:.0f} % | {share(row['accuracy_paper_rule'])} |"
        )
    return lines


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} % right"


def caveats(report: dict[str, Any]) -> list[str]:
    """Every warning of the report, word for word."""
    warnings = report["meta"]["warnings"]
    return ["", *(["The report's own warnings:", ""] if warnings else []), *(f"- {text}" for text in warnings)]


def abroad(found: dict[str, Any]) -> str:
    """What becomes of the shipped defences on sets that they were not tuned on."""
    rows = {(row["task"], row["model"]): row for row in found["zero_shot"] if row["prompts"] == "photo"}
    title = {"undefended": "undefended", "embedded": '`"embedded"`', "general": f"`{GENERAL}`"}
    models = tuple(title)
    lines = [
        "| clean / T1 / T2 at 4/255, % | " + " | ".join(title[model] for model in models) + " |",
        "|---|" + "---|" * len(models),
    ]
    for task in dict.fromkeys(task for task, _ in rows):
        cells = [" / ".join(f"{100 * rows[task, m][key]['accuracy']:.1f}" for key in THREATS) for m in models]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    n = next(iter(rows.values()))["n"]
    return "\n".join(
        [
            '**The shipped model is for the ten names it was tuned on.** On others the robust branches of `"embedded"` '
            "have forgotten most of what the CLIP knew, and it warns when it is asked for one. "
            f"[`{GENERAL}`]({GENERAL}/README.md) was tuned by FARE, which holds the features where they were, with "
            "labels beside it, on the clothes and on Tiny-ImageNet classes: it is less robust to a white-box attacker "
            "and keeps most of what the CLIP knew of other names. "
            f'`ZePAD.from_pretrained("{GENERAL}")` loads it from a clone; `zepad defend --defences fare` tunes so, '
            "without labels.",
            "",
            *lines,
            "",
            f"n = {n} each, one seed, half a 95 % interval at most {_widest(rows.values()):.0f} points; T2 here is one "
            f"PGD, so an upper bound; `reproduction/clip_table.py`, commit {found['meta']['commit']}.",
        ]
    )


def _widest(rows: Iterable[dict[str, Any]]) -> float:
    return max(50 * (row[key]["ci_high"] - row[key]["ci_low"]) for row in rows for key in THREATS)


def readme(old: str) -> str:
    """The README with the block between its marks written anew."""
    before, rest = old.split(START)
    block = f"{table(read_json(REPORT)).rstrip()}\n\n{abroad(read_json(ABROAD))}"
    return f"{before}{START}\n\n{block}\n\n{END}{rest.split(END)[1]}"


def card(model: Path, report: Path, name: str, _: str) -> str:
    """The card of a committed model, which is loaded by ``name``."""
    config = ZePADConfig.from_dict(read_json(model / CONFIG))
    return model_card(config, Report.load(report.parent)).replace(PLACEHOLDER, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    args = parser.parse_args()
    stale = []
    recipes = ROOT / "recipes" / "README.md"
    writers: dict[Path, Callable[[str], str]] = {ROOT / "README.md": readme, recipes: recipes_readme}
    writers[EMBEDDED_MODEL / "README.md"] = partial(card, EMBEDDED_MODEL, REPORT, "embedded")
    writers[ROOT / GENERAL / "README.md"] = partial(card, ROOT / GENERAL, GENERAL_REPORT, GENERAL)
    for path, write in writers.items():
        old = path.read_text(encoding="utf-8")
        new = write(old)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                write_text(path, new)
    if args.check:
        print(f"not what the report says: {', '.join(stale)}; run without --check" if stale else "up to date")
        sys.exit(bool(stale))


if __name__ == "__main__":
    main()
