"""The page of ``benchmarks/attack_parity.py``: one section for each model and budget."""

from __future__ import annotations

from typing import Any

from zepad_mm.evaluation.metrics import wilson
from zepad_mm.utils.text import interval_text, markdown_table, percent

COLUMN, FEW, AUTO = "T2", "T2, few images", "torchattacks AutoAttack"
PUBLISHED = "published: "
MARGIN, FACTOR = 0.01, 3  # T2 may be above published attacks by that much; AutoAttack must cost that many times more

Record = dict[str, Any]


def bits(result: Record) -> str:
    """One character for each image, "1" where it stayed right."""
    return f"{int(result['right'], 16):0{result['n']}b}"


def summary(stages: Record) -> Record:
    """What the measurements on one target say.

    ``above_union``: accuracy under T2 less that under all published attacks. ``cost_ratio``: CPU time of torchattacks'
    AutoAttack over that of T2, on the same images; ``above_auto``: accuracy under T2 less that under it.
    """
    found: Record = {}
    published = [result for name, result in stages.items() if name.startswith(PUBLISHED)]
    if published and COLUMN in stages:
        union, ours = published[-1], stages[COLUMN]  # each ran on what the earlier ones left
        found["union"], found["n"] = union["accuracy"], ours["n"]
        found["above_union"] = ours["accuracy"] - union["accuracy"]
        pairs = list(zip(bits(ours), bits(union), strict=True))
        found["only_ours_breaks"] = pairs.count(("0", "1"))
        found["only_theirs_breaks"] = pairs.count(("1", "0"))
    if {FEW, AUTO} <= stages.keys():
        ours, theirs = stages[FEW], stages[AUTO]
        found["cost_ratio"] = theirs["cpu_seconds"] / max(ours["cpu_seconds"], 1e-9)
        found["above_auto"] = ours["accuracy"] - theirs["accuracy"]
        found["few"] = ours["n"]
    return found


def markdown(runs: list[Record]) -> str:
    """The page of all runs."""
    lines = [
        "# Attacks compared with other libraries and with published code",
        "",
        "T2 is the white-box column of an evaluation, on the model as it ships or on one branch alone. Every attack "
        "gets the same network, folded for inference; CPU seconds of one thread, with the folding for T2. Published "
        "code is not in this repository; each published attack runs on the images that the earlier ones left, so that "
        "the last row of them is their union. torchattacks' AutoAttack runs as it comes: apgd-ce and apgd-t of 10 "
        "steps, fab-t, and 5000 queries of square. Rows `zepad_mm` and `adv_lib` compare single attacks at equal "
        "settings. Written by `python -m benchmarks.attack_parity`.",
    ]
    for run in runs:
        lines += ["", *section(run)]
    return "\n".join(lines) + "\n"


def section(run: Record) -> list[str]:
    """One model at one budget."""
    meta, config = run["meta"], run["meta"]["config"]
    versions = ", ".join(f"{name} {meta['versions'][name]}" for name in ("torch", "torchattacks", "adv-lib"))
    preset = f"preset `{config['preset']}`; " if config["preset"] else ""
    lines = [
        f"## Model `{config['model']}`, data `{config['data']}`, L-inf {config['epsilon'] * 255:.4g}/255",
        "",
        f"{config['n']} test images; {preset}commit {meta['commit']}, seed {meta['seed']}, "
        f"{meta['hardware']}; {versions}.",
    ]
    lines += [f"Model: {config['about']}."] * bool(config["about"])
    lines += [f"Published code: {config['published']}."] * bool(config["published"])
    for target, found in run["targets"].items():
        lines += ["", f"### {target[0].upper()}{target[1:]}", "", table(found)]
        said = sentences(found)
        lines += ["", *said] if said else []
    return lines


def table(found: Record) -> str:
    """Accuracies and times of one target."""
    stages = found["stages"]
    rows = [["none", "", percent(found["clean"]), ""]] if "clean" in found else []
    for name, stage in stages.items():
        count = round(stage["accuracy"] * stage["n"])
        accuracy = interval_text(stage["accuracy"], *wilson(count, stage["n"]))
        rows.append([name, str(stage["n"]), accuracy, f"{stage['cpu_seconds']:.1f}"])
    return markdown_table(["attack", "images", "accuracy in % (95 % interval)", "CPU s"], rows)


def sentences(found: Record) -> list[str]:
    """The comparison in words."""
    said, lines = summary(found["stages"]), []
    if "union" in said:
        points, held = said["above_union"] * 100, said["above_union"] <= MARGIN
        lines.append(
            f"- T2 is {abs(points):.1f} points {'above' if points > 0 else 'below'} the union of the published "
            f"attacks (n = {said['n']}; {'at most' if held else 'MORE THAN'} {MARGIN * 100:g} point above): only T2 "
            f"breaks {said['only_ours_breaks']} images, only they break {said['only_theirs_breaks']}."
        )
    elif COLUMN in found["stages"] and found["stages"][COLUMN]["accuracy"] == 0:
        lines.append("- T2 leaves no image right, so that no other attack can leave fewer.")
    if "cost_ratio" in said:
        points, held = said["above_auto"] * 100, said["cost_ratio"] >= FACTOR
        lines.append(
            f"- torchattacks' AutoAttack takes {said['cost_ratio']:.1f} times the CPU time of T2 on the same "
            f"{said['few']} images ({'at least' if held else 'LESS THAN'} {FACTOR} times), where T2 leaves "
            f"{abs(points):.1f} points {'more' if points > 0 else 'less'}."
        )
    if "pgd" in found:
        pgd = found["pgd"]
        lines.append(
            f"- PGD without random start, ours and torchattacks': the last iterates differ by at most "
            f"{pgd['largest_difference']:.2g} ({pgd['unequal_pixels'] * 100:.3g} % of pixels by more than 1e-6)."
        )
    return lines
