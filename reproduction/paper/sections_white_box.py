"""Section of ``docs/RESULTS.md`` on white-box attacks on the strong zoo."""

from __future__ import annotations

from typing import Any

from reproduction.paper.cells import Rows, grid, mark, one, origin, percent, pick
from reproduction.paper.records import at_budget, levels

WITHIN = 4  # victims whose policy "white_box" keeps what the best branch keeps under T2


def strong_white_box(record: dict[str, Any]) -> str:
    """Table 6: T2 of ours by both policies, and of the paper's design, beside its best branch."""
    reports, config = record["reports"], record["meta"]["config"]
    settings = config["white_box"]
    budgets = dict.fromkeys([settings["epsilon"], *config.get("white_box_epsilons", [])])
    suffix = {epsilon: "" if epsilon == settings["epsilon"] else at_budget("", epsilon) for epsilon in budgets}
    parts = []
    for epsilon, end in suffix.items():
        others = [other for other in suffix.values() if other and other != end]
        titles = [title for title in reports if title.endswith(end) and not title.endswith(tuple(others))]
        rows = {title.removesuffix(end): reports[title]["rows"] for title in titles}
        lines = [
            [title, *(percent(one(found, model="zepad", threat=threat)) for threat in ("clean", "T2", "T3")),
             *_beside_best_branch(found)]
            for title, found in rows.items()
        ]  # fmt: skip
        policies = [found for title, found in rows.items() if title.endswith("white_box")]
        head = ["victim and model", "clean", "T2", "T3", "best branch under T2", "T2 against it"]
        parts += [f"### At {levels(epsilon)}\n", f"- {_within(policies)}\n", grid(head, lines)]
    n = next(iter(reports.values()))["rows"][0]["n"]
    text = (
        f"On CIFAR-10, n = {n}; T2 and T3 by {', '.join(settings['own_attacks'])} with {settings['steps']} steps and, "
        f"on fused models, {', '.join(settings['adaptive'])}.\n"
    )
    return "\n".join([text, *parts, origin(record)])


def _best_branch(rows: Rows) -> tuple[dict[str, Any], float]:
    """The branch that keeps most under T2, and by how many points the whole model keeps less."""
    branches = [row for row in pick(rows, threat="T2") if row["model"].startswith("branch:")]
    best = max(branches, key=lambda row: row["accuracy"])
    return best, 100 * (best["accuracy"] - one(rows, model="zepad", threat="T2")["accuracy"])


def _beside_best_branch(rows: Rows) -> list[str]:
    best, lost = _best_branch(rows)
    return [f"{best['model'].removeprefix('branch:')} {percent(best)}", f"{0 - lost:+.1f}"]


def _within(reports: list[Rows]) -> str:
    """The goal of the policy "white_box" at a budget, from the rows of its models; without a verdict for too few."""
    found = [_best_branch(rows) for rows in reports]
    within, best = sum(lost <= 1 for _, lost in found), max(branch["accuracy"] for branch, _ in found)
    verdict = f"{mark(within >= WITHIN)} (goal {WITHIN} victims): t" if len(found) >= WITHIN else "T"
    victims = "1 victim" if len(found) == 1 else f"{len(found)} victims"
    text = f"{verdict}he policy `white_box` is within one point of the best branch for {within} of {victims}"
    if not best:
        return f"{text}. That says little: no branch keeps anything at this budget."
    return f"{text}; the best branch keeps {100 * best:.1f} % at most."
