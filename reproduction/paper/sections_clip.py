"""The sections of ``docs/RESULTS.md`` that are about the embedded CLIP."""

from __future__ import annotations

from typing import Any

from reproduction.paper.cells import distinct, grid, origin, percent, pick


def clip(report: dict[str, Any]) -> str:
    """Table 9 from the report of the demo: the embedded CLIP, zero-shot, every column the worst case of its threat."""
    rows, threats = report["rows"], ("clean", "T1", "T1b", "T2")
    lines = []
    for model in distinct(rows, "model"):
        cells = [pick(rows, model=model, threat=t, attack="none" if t == "clean" else "worst") for t in threats]
        if all(cells):
            bounds = ["≤ " if cell[0].get("upper_bound") else "" for cell in cells]
            lines.append([model, *(bound + percent(cell[0]) for bound, cell in zip(bounds, cells, strict=True))])
    two = pick(rows, threat="T2")[0]
    text = (
        f"The embedded CLIP on {two['dataset']}, n = {two['n']}, T1 and T1b at 10/255, T2 at "
        f"{255 * two['epsilon']:.0f}/255, by `scripts/demo`. The paper prints no figures for CLIP.\n"
    )
    return "\n".join([text, grid(["model", *threats], lines), origin(report)])


def clip_abroad(record: dict[str, Any]) -> str:
    """Names, styles and prompts that the embedded CLIP or its defence never saw; LoRA ranks."""
    threats = ("clean", "T1", "T2")
    lines = [
        [row["task"], f"{row['names_read']} of {row['n_classes']}", row["pictures"], row["prompts"], row["model"]]
        + [percent(row[threat]) for threat in threats]
        for row in record["zero_shot"]
    ]
    head = ["pictures", "names read", "set", "prompts", "model", "clean", "T1, 10/255", "T2, 4/255 (one PGD: at most)"]
    text = (
        "`embedded` was tuned by labels on ten names of clothing: on other sets it loses most of what the public CLIP "
        "knew, clean pictures included. `general` (`recipes/models/general`) was tuned by FARE with "
        "labels on clothes and on the 64 named classes of tinyimagenet80.\n"
    )
    tuned = [
        [row["defence"], str(row["rank"] or "all weights"), row["task"], *(percent(row[threat]) for threat in threats)]
        for row in record["baselines"]
    ]
    steps = record["meta"]["config"]["tune_steps"]
    short = f"### Baselines on the CLIP: one encoder alone, {steps} steps, no match for the shipped branches\n"
    head_of = ["defence", "LoRA rank", "pictures", *head[-3:]]
    parts = [text, grid(head, lines), *([short, grid(head_of, tuned)] if tuned else [])]
    return "\n".join([*parts, origin({"meta": {"seed": 0, **record["meta"]}})])
