"""docs/CROSS_DEFENCE.md from the record: protocol, tables, and what follows from the intervals."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from zepad_mm.evaluation.metrics import Share
from zepad_mm.utils.text import budget_text, bullets, interval_text, markdown_table, percent

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "CROSS_DEFENCE.md"
FIGURE = ROOT / "docs" / "images" / "cross_defence.png"
TITLES = {
    "undefended": "undefended CLIP",
    "robust": "robust encoder alone",
    "ttc": "TTC",
    "csr": "CSR",
    "agc": "AGC",
    "r_adapt": "R-Adapt (training-free)",
    "r_adapt_guided": "R-Adapt (model-guided)",
    "interpolation": "weight interpolation",
    "smoothing": "randomised smoothing",
    "smoothing_robust": "smoothing of the robust encoder",
    "zepad_rule": "ZePAD's rule",
    "mixed_nuts": "MixedNUTS",
    "adaptive_smoothing": "adaptive smoothing",
    "ours": "this project's model",
}
GONE = 0.05  # an accuracy that is clearly below this share counts as none
FAR = 0.10  # a difference of accuracies that the text names


class Table:
    """The cells of a record by defence, task and column."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.cells = record["cells"]
        self.config = record["meta"]["config"]
        self.tasks = list(self.config["tasks"])
        attacked = {cell["epsilon"] for cell in self.cells if cell["column"] == "adaptive"} or self.config["epsilons"]
        self.strong, self.weak = max(attacked), min(attacked)  # one where a run was cut off after the first
        every = sorted((about["key"] for about in record["defences"]), key=_place)
        self.defences = [key for key in every if self._complete(key, "clean", None)]
        self.attacked = [key for key in self.defences if self._complete(key, "adaptive", self.strong)]
        self.missing = [key for key in every if key not in self.attacked]  # of a run that was cut off
        if not self.attacked:
            raise ValueError("no defence was attacked on every task; start the run again to measure what is missing")

    def _complete(self, key: str, column: str, epsilon: float | None) -> bool:
        return all(self.share(key, column, epsilon, task) for task in self.tasks)

    def share(self, defence: str, column: str, epsilon: float | None = None, task: str | None = None) -> Share | None:
        """A cell, or all tasks together; None where it was not measured."""
        cells = [
            cell
            for cell in self.cells
            if (cell["defence"], cell["column"]) == (defence, column)
            and (epsilon is None or abs((cell["epsilon"] or 0) - epsilon) < 1e-9)
            and task in (None, cell["task"])
        ]
        if not cells:
            return None
        return Share(sum(cell["correct"] for cell in cells), sum(cell["n"] for cell in cells))

    def adaptive(self, defence: str, task: str | None = None) -> Share:
        """Under the adaptive attack at the larger budget."""
        found = self.share(defence, "adaptive", self.strong, task)
        assert found is not None
        return found

    def passes(self, defence: str) -> str:
        """Forward and backward passes per image, mean over tasks."""
        cells = [cell for cell in self.cells if (cell["defence"], cell["column"]) == (defence, "clean")]
        keys = ("forward_passes", "backward_passes")
        return " + ".join(f"{sum(cell[key] for cell in cells) / len(cells):.3g}" for key in keys)


def _place(key: str) -> tuple[int, str]:
    """Where a defence stands in tables: further robust encoders behind the first one, other caps behind the model."""
    order = list(TITLES)
    near = "ours" if is_cap(key) else "robust"
    return (order.index(key if key in order else near), key)


def is_cap(key: str) -> bool:
    return key.startswith("ours, cap")


def _text(share: Share | None) -> str:
    return "" if share is None else interval_text(share.value, *share.interval)


def title(key: str) -> str:
    """A defence as tables name it; rows of further robust encoders are named by model and branch."""
    if is_cap(key):
        return f"{TITLES['ours']} ({key.removeprefix('ours, ')})"
    return TITLES.get(key, f"robust encoder {key}")


def page(record: dict[str, Any]) -> str:
    """The page."""
    table, meta = Table(record), record["meta"]
    config = meta["config"]
    parts = [
        "# Published defences under one adaptive attack",
        f"Training-free and test-time defences of CLIPs, all around the same CLIP (`{config['clip']}`, "
        f"{config['image_size']} pixels) and, where they need a robust encoder, around the same one (of the model "
        f"`{config['model']}`), on the same {config['n']} test images of each task ({', '.join(table.tasks)}) "
        "with zero-shot heads. Each is attacked twice: as its authors did, and by an attack that knows it and "
        "includes the others.",
        "## All tasks together",
        "Accuracy in % with 95 % Wilson intervals. Passes: forward + backward passes of an encoder for an answer.",
        _table(table, None),
        "![What each defence keeps, and the frontier of what fuses both encoders](images/cross_defence.png)",
        "Left: all tasks together, a mark for each attack. Right: what chooses between both encoders, clean accuracy "
        f"against that under the adaptive attack at {budget_text(table.weak, 'linf')}; the red line is the dial of the "
        "gate, from the robust encoder alone to the model as it ships.",
        "## What holds and what does not",
        bullets(_findings(table)) or "The rows to compare with were not measured.",
        "These are statements about this CLIP, these budgets and these attacks. An attack gives an upper bound: "
        "the true accuracy can only be lower, most of all where answers are random. The defences are written anew from "
        "their papers and code, for an encoder of another size than their authors used: thresholds of TTC, CSR and AGC "
        "and the share of R-Adapt are set on clean images of this CLIP, AGC sees fewer views, and R-Adapt, whose code "
        "could not be read, is guessed in part. A result here does not contradict a published number that was measured "
        "on another encoder or under another threat model.",
        *_certificates(table),
        *([f"Not attacked on every task: {', '.join(map(title, table.missing))}."] if table.missing else ()),
        "## Protocol",
        bullets(_protocol(config)),
        "## The defences",
        _legend(record),
        "## Each task",
        *(f"### {task}\n\n{_table(table, task)}" for task in table.tasks),
        f"Written by `{command(config)}`, from `results/cross_defence.json`: commit {meta['commit']}, "
        f"{meta['hardware']}, torch {meta['versions']['torch']}, seed {meta['seed']}, "
        f"the cells took {meta['cells_s'] / 3600:.1f} hours in all.",
    ]
    return "\n\n".join(parts) + "\n"


def command(config: dict[str, Any]) -> str:
    """The command that makes a record with these settings."""
    words = ["python", "-m", "reproduction.cross_defence", "--data-root", "DIR", "--n", str(config["n"])]
    words += ["--capacity", str(config["strength"]["capacity"])]
    words += ["--epsilons", *(f"{round(255 * epsilon)}/255" for epsilon in config["epsilons"])]
    return shlex.join([*words, "--tasks", *config["tasks"], "--defences", *config["defences"]])


def _table(table: Table, task: str | None) -> str:
    config = table.config
    strong, weak = (budget_text(epsilon, "linf") for epsilon in (table.strong, table.weak))
    head = ["defence", "clean", f"T1, {budget_text(config['epsilon_universal'], 'linf')}", f"authors' attack, {strong}"]
    further = [weak] if table.weak < table.strong else []
    head += [f"adaptive, {budget}" for budget in (strong, *further)] + ["passes"]
    lines = []
    for defence in table.defences:
        measured = defence in table.attacked  # else some tasks are missing, and a sum over the others misleads
        strong_cells = [table.share(defence, column, table.strong, task) for column in ("authors", "adaptive")]
        authors, adaptive = (_text(share) if measured else "not measured" for share in strong_cells)
        weak_cells = [_text(table.share(defence, "adaptive", table.weak, task)) for _ in further]
        public = [_text(table.share(defence, column, None, task)) for column in ("clean", "T1")]
        lines.append([title(defence), *public, authors or "as T1", adaptive, *weak_cells, table.passes(defence)])
    return markdown_table(head, lines)


def _findings(table: Table) -> list[str]:
    """Sentences that follow from the intervals, all tasks together."""
    if not {"undefended", "robust"} <= set(table.attacked):
        return []
    robust, budget = table.adaptive("robust"), budget_text(table.strong, "linf")
    others = [key for key in table.attacked if key not in ("undefended", "robust")]
    gone = [key for key in others if table.adaptive(key).interval[1] < GONE]
    above = [key for key in others if table.adaptive(key).interval[0] > robust.interval[1]]
    level = [key for key in others if key not in above and table.adaptive(key).interval[1] >= robust.interval[0]]
    level = [key for key in level if key not in gone]
    between = [key for key in others if key not in (*gone, *above, *level)]
    adaptive = partial(_named, table.adaptive)
    found = [
        f"The robust encoder alone keeps {_text(robust)} under the adaptive attack at {budget}, at "
        f"{_value(table, 'robust')} clean; the undefended CLIP keeps {_text(table.adaptive('undefended'))} and has "
        f"{_value(table, 'undefended')} clean."
    ]
    groups = [
        (f"Clearly above the robust encoder at {budget}", above),
        (f"With an interval that overlaps that of the robust encoder at {budget}", level),
        ("Between nothing and the robust encoder", between),
        (f"Clearly below {percent(GONE)} % at {budget}", gone),
    ]
    found += [f"{text}: {adaptive(keys)}." for text, keys in groups if keys]
    own = {key: table.share(key, "authors", table.strong) for key in others}
    large = [(key, share) for key, share in own.items() if share and share.value - table.adaptive(key).value > FAR]
    if large:
        told = ", ".join(
            f"{title(key)} {percent(share.value)} to {percent(table.adaptive(key).value)}" for key, share in large
        )
        found.append(
            f"The attack that its authors used leaves over {100 * FAR:.0f} points more than the adaptive one at the "
            f"same budget: {told}."
        )
    if "ours" in others:
        better = [key for key in others if table.adaptive(key).value > table.adaptive("ours").value]
        shown = [f"{title(key)} {percent(table.adaptive(key).value)} ({_value(table, key)} clean)" for key in better]
        found.append(
            f"This project's model as it ships keeps {_text(table.adaptive('ours'))} at {_value(table, 'ours')} clean. "
            f"More under this attack keep: {', '.join(shown) or 'none'}."
        )
    kept = [key for key in others if _above(table, key, "T1")]
    if kept:
        named = _named(lambda key: table.share(key, "T1"), kept)
        found.append(f"Against universal perturbations made on the public CLIP (T1) clearly above it: {named}.")
    return found


def _above(table: Table, key: str, column: str) -> bool:
    own, undefended = table.share(key, column), table.share("undefended", column)
    return own is not None and undefended is not None and own.interval[0] > undefended.interval[1]


def _value(table: Table, key: str) -> str:
    clean = table.share(key, "clean")
    return "" if clean is None else percent(clean.value)


def _named(share: Callable[[str], Share | None], keys: Sequence[str]) -> str:
    ordered = sorted(((share(key), key) for key in keys), key=lambda pair: -(pair[0].value if pair[0] else 0))
    return ", ".join(f"{title(key)} {percent(found.value)}" for found, key in ordered if found)


def _certificates(table: Table) -> list[str]:
    columns = sorted({cell["column"] for cell in table.cells if cell["column"].startswith("certified")})
    keys = [key for key in table.defences if any(table.share(key, column) for column in columns)]
    if not keys:
        return []
    side = table.config["image_size"]
    lines = [[title(key), *(_text(table.share(key, column)) for column in columns)] for key in keys]
    return [
        "## Certificates",
        f"Share of {table.config['certify_images']} images of each task that randomised smoothing answers right with a "
        "certified L2 radius of at least so much, in pixels of [0, 1], from "
        f"{table.config['certify_n']} noisy copies (99.9 % confidence per image). An L-inf "
        f"budget of {budget_text(table.strong, 'linf')} at {side} pixels is an L2 length of up to "
        f"{table.strong * (3 * side * side) ** 0.5:.2f}.",
        markdown_table(["defence", *(column.replace("certified ", "") for column in columns)], lines),
    ]


def _protocol(config: dict[str, Any]) -> list[str]:
    strength = config["strength"]
    return [
        f"Images: {config['n']} of each test split, drawn by seed {config['seed']}, resized to the encoder's size "
        "before the attack; budgets are L-inf. Thresholds come from clean training images, never from test images.",
        f"T1: the worst case per image over {len(config['universal'])} universal perturbations "
        f"({', '.join(config['universal'])}) made on the public CLIP; the defence is not attacked.",
        "Authors' attack: the kind of attack in the defence's paper or code, at the budget of the column, see the list "
        f"below: PGD ({strength['pgd_steps']} steps, cross-entropy) or APGD ({strength['steps']} steps, DLR) on the "
        f"undefended CLIP, or the cross-entropy through the defence (APGD, {strength['steps']} steps, or as below).",
        "Adaptive attack: the worst case per image over examples that are made once and tried on every defence (both "
        f"attacks on the undefended CLIP, APGD-CE of {strength['steps']} steps on the robust encoder and on the mean "
        "log-probability of both encoders, the universal perturbations at this budget); then over APGD-CE "
        f"({strength['steps']} steps) along every gradient path of the defence; momentum PGD on the margin "
        f"({strength['margin_steps']} steps) and APGD-T (DLR, {strength['targets']} targets, "
        f"{strength['target_steps']} steps each) along the first; and MORA (five runs of {strength['mora_steps']} "
        "steps) on fusions. Through randomness, whose noise halts APGD, the momentum "
        f"iterative method ({strength['random_steps']} steps) takes the place of these.",
        "Gradient paths: through the defence, with steps without a gradient held constant (BPDA), with new randomness "
        "at each step (EOT), and at its parts together. Each attack takes the images that are still answered right; "
        f"where a path cannot tell that an image is finished, an APGD-CE of {strength['opening_steps']} steps comes "
        "first.",
        f"Random defences: the accuracy is the mean over {strength['draws']} answers, or of one where the defence "
        "averages over its randomness itself. The example that counts is chosen by other answers than those that score "
        "it; under T1 the same answers do both, which is a little low for random defences.",
        "`after` in the record's cells gives the accuracy after each attack.",
    ]


def _legend(record: dict[str, Any]) -> str:
    from reproduction.cross_defence.attacks import AUTHORS

    lines = []
    for about in sorted(record["defences"], key=lambda about: _place(about["key"])):
        constants = ", ".join(f"{key} {value:.4g}" for key, value in about["constants"].items())
        lines.append([title(about["key"]), about["about"], AUTHORS[about["attack"]], constants])
    return markdown_table(["defence", "what", "authors' attack", "constants"], lines)
