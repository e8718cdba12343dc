"""Sections of ``docs/RESULTS.md`` about the embedded CLIP."""

from __future__ import annotations

from typing import Any

from reproduction.paper.cells import distinct, grid, origin, percent, pick


def clip(report: dict[str, Any]) -> str:
    """Table 9 from the report of the demo: the embedded CLIP, zero-shot; columns are worst cases of their threat."""
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
        f"{255 * two['epsilon']:.0f}/255, by `scripts/demo`. The paper reports nothing on CLIP.\n"
    )
    return "\n".join([text, grid(["model", *threats], lines), origin(report)])


def clip_transfer(record: dict[str, Any]) -> str:
    """Class names, styles and prompts unknown to the embedded CLIP or its defence; LoRA ranks."""
    threats = ("clean", "T1", "T2")
    lines = [
        [row["task"], f"{row['names_in_training']} of {row['n_classes']}", row["images"], row["prompts"], row["model"]]
        + [percent(row[threat]) for threat in threats]
        for row in record["zero_shot"]
    ]
    head = [
        "images",
        "class names in training texts",
        "data set",
        "prompts",
        "model",
        "clean",
        "T1, 10/255",
        "T2, 4/255 (one PGD: upper bound)",
    ]
    text = (
        f"Of the models that shipped at commit {record['meta']['commit']}, over an earlier embedded CLIP of 64 pixels: "
        "`embedded` was tuned with labels on ten class names of clothing and loses most of that CLIP's accuracy on "
        "other data sets, on clean images too. `general` was tuned by FARE with labels on clothes and on the 64 "
        "classes of tinyimagenet80 that the CLIP was trained on.\n"
    )
    tuned = [
        [row["defence"], str(row["rank"] or "all weights"), row["task"], *(percent(row[threat]) for threat in threats)]
        for row in record["baselines"]
    ]
    steps = record["meta"]["config"]["tune_steps"]
    title = f"### Baselines on the CLIP: one encoder alone, {steps} steps, much shorter than the shipped branches\n"
    tuned_head = ["defence", "LoRA rank", "images", *head[-3:]]
    parts = [text, grid(head, lines), *([title, grid(tuned_head, tuned)] if tuned else [])]
    return "\n".join([*parts, origin({"meta": {"seed": 0, **record["meta"]}})])
