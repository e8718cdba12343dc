"""Sections of ``docs/RESULTS.md`` about the strong zoo, and the summary at its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import mean, stdev
from typing import Any

from reproduction.paper import published
from reproduction.paper.cells import Rows, by_attack, distinct, grid, mark, one, origin, percent, pick, worst

UNDEFENDED, PAPERS, ROBUST, OURS = "undefended", "paper's", "ours: tuned victim alone", "ours"
MEAN_GAIN, LARGEST_GAIN, MOST_LOST, AUROC = 40.0, 60.0, 0.5, 0.95  # the goals of this project
GATE, GAP = "feature_gate", "confidence_gap"
PROBES = ("linear_accuracy", "knn_accuracy")
SEEDS_HEAD = ("BA undefended", "BA ours", "RA undefended", "RA ours", "RA gain", "gate: AUROC")


def strong_zoo(record: dict[str, Any]) -> str:
    """The probe of each victim before and after its own objective."""
    rows, theirs = record["rows"], record["published"]
    lines = [
        [name, *(f"{100 * row['before'][key]:.1f} to {100 * row[key]:.1f}" for key in PROBES), str(theirs[name])]
        for name, row in rows.items()
    ]  # fmt: skip
    first = next(iter(rows.values()))
    config = first["config"]
    reached = sum(row["linear_accuracy"] >= 0.8 for row in rows.values())
    worse = [name for name, row in rows.items() if row["linear_accuracy"] < row["before"]["linear_accuracy"]]
    minutes = max(row["wall_s"] for row in rows.values()) / 60  # they ran side by side
    text = (
        f"EfficientNet-Lite0, initialised from ImageNet weights, {first['parameters'] / 1e6:.1f} M parameters, "
        f"{config['image_size']} px; each method continued for {config['epochs']} epochs of {first['n_train']} images "
        f"(the public half of CIFAR-10, and {' and '.join(config['more_data'])}), without labels but for supcon. "
        f"Accuracy on {first['n_held_out']} held-out images of CIFAR-10, in %. {reached} of {len(rows)} reach 80 %, "
        f"the aim; what is missing is training time: all eleven together had {minutes:.0f} minutes of one GPU. "
        f"{', '.join(worse)} lost by it and are weak victims.\n"
    )
    about = f"Commit {first['commit']}, {first['hardware']}.\n"
    head = ["method", "linear probe, before to after", "kNN, before to after", "paper's encoders: linear"]
    return "\n".join([text, grid(head, lines), about])


def strong_main(record: dict[str, Any]) -> str:
    """Table 1: each victim on each task; and the goals."""
    rows = record["rows"]
    models = [model for model in (UNDEFENDED, PAPERS, ROBUST, OURS) if pick(rows, model=model)]
    lines = []
    for task, victim in cells(rows):
        cell = pick(rows, task=task, victim=victim)
        clean = [pick(cell, model=model, threat="clean") for model in models if model != ROBUST]
        attacked = [worst(cell, model=model, threat="T1") if pick(cell, model=model) else None for model in models]
        gain = gains(cell, OURS, "T1")[0]
        lines.append(
            [task, victim, *(percent(found[0]) if found else "-" for found in clean),
             *(percent(found) if found else "-" for found in attacked), f"{gain:+.1f}"]
        )  # fmt: skip
    n, attacks = distinct(rows, "n"), dict.fromkeys(_attack(row) for row in pick(rows, threat="T1"))
    names = [name.removeprefix("ours: ") for name in models]
    head = ["task", "victim", *(f"BA {name}" for name in names if name != "tuned victim alone")]
    head += [*(f"RA {name}" for name in names), "RA gain"]
    config = record["meta"]["config"]
    crafted, surrogate = _names([config["data"]])[0], _names([config.get("surrogate_data") or ""])[0]
    if surrogate:
        crafted += f" for the task {crafted}, of {surrogate} for the others"
        crafted += ", on some of which ours was tuned" if surrogate in _names(config["more_data"]) else ""
    compared = _shared(rows, models)
    text = (
        f"Tuned once on CIFAR-10; ours without labels, and on {' and '.join(_names(config['more_data']))} too. T1 at "
        f"10/255, made on the victim by {', '.join(attacks)} from images of {crafted}; RA: the strongest attack. "
        f"n = {_range(n)} test images a cell; MLP heads on clean images. The paper's own design is measured for "
        f"{_measured(distinct(rows, 'victim'), distinct(pick(rows, model=PAPERS), 'victim'))}: RFDM over the tuned "
        f"victim, a tuned auxiliary encoder ({config['adv_au']}; for itself {config['adv_au_for_itself']}) and a "
        f"benign one.\n"
    )
    goals = "".join(f"- {line}\n" for line in main_verdicts(rows))
    return "\n".join(
        [
            text,
            goals,
            grid(head, lines),
            f"### By task, mean over {_measured(distinct(rows, 'victim'), distinct(compared, 'victim'))}\n",
            _by_task(compared, models),
            "### By attack, mean over the same victims and all tasks\n",
            by_attack(compared, models),
            origin(record),
        ]
    )


def _shared(rows: Rows, models: list[str]) -> Rows:
    """The rows of the victims that every model is measured for."""
    kept = [v for v in distinct(rows, "victim") if all(pick(rows, victim=v, model=model) for model in models)]
    return [row for row in rows if row["victim"] in kept]


def _by_task(rows: Rows, models: list[str]) -> str:
    """Clean accuracy and that under the strongest attack of each model, mean over victims."""
    lines = []
    for task in distinct(rows, "task"):
        found = [pick(rows, task=task, model=model) for model in models]
        cells_of = [[mean(_accuracies(part, part[0]["model"], t)) for t in ("clean", "T1")] for part in found]
        gain = mean(gains(pick(rows, task=task), OURS, "T1"))
        lines.append([task, *(f"{clean:.1f}, {attacked:.1f}" for clean, attacked in cells_of), f"{gain:+.1f}"])
    return grid(["task, BA and RA", *models, "RA gain of ours"], lines)


def _measured(victims: list[str], shown: list[str]) -> str:
    """The victims that the paper's design is measured for, in words."""
    missing = [name for name in victims if name not in shown]
    if len(missing) >= len(shown):
        return ", ".join(shown)
    return f"all {len(victims)} victims" + (f" but {' and '.join(missing)}" if missing else "")


def cells(rows: Rows) -> list[tuple[str, str]]:
    """Every pair (task, victim) that is there."""
    return list(dict.fromkeys((row["task"], row["victim"]) for row in rows))


def gains(rows: Rows, model: str, threat: str, where: str | None = None) -> list[float]:
    """What a model has more than the undefended victim, in points; under T1 by the strongest attack on each.

    Args:
        rows: of table 1.
        model, threat: of the rows that are compared.
        where: in each cell that has a row of this model; None: of ``model``.
    """
    found = []
    for task, victim in cells(pick(rows, model=where or model)):
        pair = [worst(rows, task=task, victim=victim, model=name, threat=threat) for name in (model, UNDEFENDED)]
        found.append(100 * (pair[0]["accuracy"] - pair[1]["accuracy"]))
    return found


def main_verdicts(rows: Rows) -> Iterator[str]:
    """The goals of table 1, each with its verdict."""
    clean, attacked = (mean(_accuracies(rows, UNDEFENDED, threat)) for threat in ("clean", "T1"))
    yield f"{mark(attacked <= clean / 2)}: undefended RA {attacked:.1f} at most half of BA {clean:.1f} in the mean."
    gain, kept = gains(rows, OURS, "T1"), gains(rows, OURS, "clean")
    taken = clean - attacked
    returned = f"; ours returns {100 * mean(gain) / taken:.0f} % of them" if taken > 0 else ""
    yield (
        f"{mark(mean(gain) >= MEAN_GAIN)}: RA gain of ours {mean(gain):+.1f} in the mean (goal {MEAN_GAIN:+.0f}). The "
        f"attacks take {taken:.1f} points from the undefended victims in the mean{returned}."
    )
    yield f"{mark(max(gain) >= LARGEST_GAIN)}: largest RA gain {max(gain):+.1f} (goal {LARGEST_GAIN:+.0f})."
    low = sum(one < -MOST_LOST for one in kept)
    yield (
        f"{mark(low == 0)} on these images: BA of ours at least the undefended one less {MOST_LOST} points in "
        f"{len(kept) - low} of {len(kept)} cells; {mean(kept):+.1f} in the mean, {min(kept):+.1f} at worst. The next "
        f"table measures it on more images."
    )
    if pick(rows, model=PAPERS):
        for name, model in (("The paper's own design", PAPERS), ("Ours there", OURS)):
            gain, kept = gains(rows, model, "T1", PAPERS), gains(rows, model, "clean", PAPERS)
            yield (
                f"{name}, {len(gain)} cells: RA {mean(gain):+.1f} in the mean, {max(gain):+.1f} at most; BA "
                f"{mean(kept):+.1f} in the mean, {min(kept):+.1f} at worst."
            )


def strong_seeds(record: dict[str, Any]) -> str:
    """Table 1 of some victims with several seeds: mean and standard deviation over seeds."""
    rows, detection = record["rows"], record["detection"]
    seeds, tasks, lines, gain = distinct(rows, "seed"), distinct(rows, "task"), [], []
    for victim in distinct(rows, "victim"):
        found = {
            task: [_of_seed(rows, detection, victim=victim, task=task, seed=seed) for seed in seeds] for task in tasks
        }
        lines += [[victim, task, *_mean_and_deviation(of_seeds)] for task, of_seeds in found.items()]
        means = [
            {title: mean(found[task][place][title] for task in tasks) for title in SEEDS_HEAD}
            for place in range(len(seeds))
        ]
        lines.append([f"**{victim}**", "**mean**", *_mean_and_deviation(means)])
        gain.append([row["RA gain"] for row in means])
    by_seed = ", ".join(f"{mean(column):+.1f}" for column in zip(*gain, strict=True))
    text = (
        f"Tuning, gate and heads with the seeds {', '.join(map(str, seeds))}; pre-training, test images and "
        f"perturbations are the same. Mean and standard deviation over seeds; n = {_range(distinct(rows, 'n'))}. The "
        f"encoder of seed {seeds[0]} is that of table 1 S. RA gain by seed, mean over these victims and all tasks: "
        f"{by_seed}.\n"
    )
    return "\n".join([text, grid(["victim", "task", *SEEDS_HEAD], lines), origin(record)])


def _of_seed(rows: Rows, detection: Rows, **cell: Any) -> dict[str, float]:
    """The columns of :func:`strong_seeds` for one seed: accuracies in %, the AUROC from 0 to 1."""
    values = [
        100 * worst(rows, **cell, model=model, threat=threat)["accuracy"]
        for threat in ("clean", "T1")
        for model in (UNDEFENDED, OURS)
    ]
    auroc = mean(row["auroc"] for row in pick(detection, **cell, threat="T1"))
    return dict(zip(SEEDS_HEAD, (*values, values[3] - values[2], auroc), strict=True))


def _mean_and_deviation(of_seeds: list[dict[str, float]]) -> list[str]:
    """Each column's mean and standard deviation over seeds."""
    columns = {title: [row[title] for row in of_seeds] for title in SEEDS_HEAD}
    digits = {title: 3 if "AUROC" in title else 1 for title in SEEDS_HEAD}
    return [f"{mean(c):.{digits[title]}f} ± {stdev(c):.{digits[title]}f}" for title, c in columns.items()]


def strong_detection(record: dict[str, Any]) -> str:
    """Table 7: the gate's score and the paper's rule under T1."""
    rows = record["detection"]
    lines = []
    for task in distinct(rows, "task"):
        gate, gap = pick(rows, task=task, score=GATE, model=OURS), pick(rows, task=task, score=GAP, model=PAPERS)
        aurocs, alarms = [row["auroc"] for row in gate], mean(row["fpr_at_fpr5"] for row in gate)
        cell = [f"{mean(aurocs):.3f}", f"{min(aurocs):.3f}", f"{100 * mean(map(_accuracy, gate)):.1f}"]
        lines.append([task, *cell, f"{100 * alarms:.1f}", *_papers_detection(gap)])
    head = [
        "task",
        "gate: AUROC",
        "worst",
        "accuracy, %",
        "false alarms, %",
        "paper's gap: AUROC",
        "its rule: accuracy, %",
    ]
    aware = any("gate_aware" in gate["seen_attacks"] for gate in record["gates"].values())
    text = (
        "Clean against attacked test images. The gate's threshold is that of 5 % of clean validation images; accuracy "
        "is the mean of the shares of attacked images found and of clean ones let through. The gate was trained on "
        "adv_encoder and selected on ssp; l4a_ugs is a variant of a kind it knows, uap and uapgd are unknown to it."
    )
    if not aware:
        text += (
            " It has met no attack that knows the gate. The number and kinds of its examples were chosen on validation "
            "images of supcon under these attacks."
        )
    kinds = []
    for attack in dict.fromkeys(map(_attack, rows)):
        aurocs = [row["auroc"] for row in pick(rows, score=GATE, model=OURS) if _attack(row) == attack]
        kinds.append([attack, f"{mean(aurocs):.3f}", f"{min(aurocs):.3f}"])
    goals = "".join(f"- {line}\n" for line in detection_verdicts(rows))
    by_kind = grid(["attack", "gate: AUROC", "worst"], kinds)
    headings = (
        "### By task, mean over victims and attacks; worst: the lowest AUROC of a cell\n",
        "### By attack, mean over victims and tasks\n",
    )
    return "\n".join([f"{text}\n", goals, headings[0], grid(head, lines), headings[1], by_kind, origin(record)])


def detection_verdicts(rows: Rows) -> Iterator[str]:
    """The goals of table 7, each with its verdict."""
    gate, gap = pick(rows, score=GATE, model=OURS), pick(rows, score=GAP, model=PAPERS)
    accuracy, auroc = 100 * mean(map(_accuracy, gate)), mean(row["auroc"] for row in gate)
    goal = published.DETECTION["C-C"]
    yield f"{mark(accuracy >= goal)}: accuracy of the gate {accuracy:.1f} % (goal {goal} %, the paper's at its best)."
    least = min(row["auroc"] for row in gate)
    yield f"{mark(auroc >= AUROC)}: AUROC of the gate {auroc:.3f} in the mean (goal {AUROC}), {least:.3f} at worst."
    if gap:
        rule = 100 * mean(row["accuracy_paper_rule"] for row in gap)
        yield f"The paper's rule beside it: {rule:.1f} %, AUROC {mean(row['auroc'] for row in gap):.3f}."


def summary(record: dict[str, Any], clean: dict[str, Any], report: dict[str, Any]) -> str:
    """The claims of the paper, what it reports, and what is measured here.

    Args:
        record, clean: tables "main" and "clean".
        report: of the demo.
    """
    rows, detection = record["rows"], record["detection"]
    gap = pick(detection, score=GAP, model=PAPERS)
    shown = set(distinct(gap, "victim"))
    every = pick(detection, score=GATE, model=OURS)
    same = [row for row in every if row["victim"] in shown]
    accuracy = 100 * mean(row["accuracy_paper_rule"] for row in gap)
    rule = f"{accuracy:.1f} %, AUROC {mean(row['auroc'] for row in gap):.2f}"
    lines = [
        ["robust accuracy rises by up to 73.86 points", *_spreads(rows, "T1", max)],
        ["no clean accuracy is lost", *_spreads(clean["rows"], "clean", min)],
        ["attacks are detected, 82.52 %", rule, *map(_known, (same, every))],
        [
            "the idea extends to CLIP (table 9)",
            "-",
            "-",
            f"clean {_change(report, 'clean')}, T1 {_change(report, 'T1')}",
        ],
    ]
    victims, tasks = (len(distinct(rows, key)) for key in ("victim", "task"))
    text = (
        f"Means and extremes over the cells of table 1 S ({victims} victims, {tasks} tasks, each tuned once): points "
        f"against the undefended victim; clean accuracy on up to {max(distinct(clean['rows'], 'n'))} test images. The "
        f"paper's design is measured for "
        f"{_measured(distinct(rows, 'victim'), list(shown))}. White-box attacks: table 6 S.\n"
    )
    head = ["claim of the paper", "its own design, measured here", "ours, the same victims", "ours, all victims"]
    if len(shown) == victims:  # both columns of ours are one
        head, lines = [*head[:2], "ours"], [[*line[:2], line[3]] for line in lines]
    return "\n".join([text, grid(head, lines)])


def _spreads(rows: Rows, threat: str, extreme: Callable[[list[float]], float]) -> list[str]:
    found = [gains(rows, PAPERS, threat), gains(rows, OURS, threat, PAPERS), gains(rows, OURS, threat)]
    end = "best" if extreme is max else "worst"
    return [f"{mean(one):+.1f} in the mean, {extreme(one):+.1f} at {end}" for one in found]


def _known(rows: Rows) -> str:
    return f"{100 * mean(map(_accuracy, rows)):.1f} %, AUROC {mean(row['auroc'] for row in rows):.2f}"


def _change(report: dict[str, Any], threat: str) -> str:
    attack = "none" if threat == "clean" else "worst"
    found = [one(report["rows"], model=model, threat=threat, attack=attack) for model in (UNDEFENDED, "zepad")]
    return f"{100 * found[0]['accuracy']:.1f} to {100 * found[1]['accuracy']:.1f}"


def _papers_detection(gap: Rows) -> list[str]:
    """AUROC of the paper's score, and the accuracy of its rule in %."""
    if not gap:
        return ["-", "-"]
    rule = mean(row["accuracy_paper_rule"] for row in gap)
    return [f"{mean(row['auroc'] for row in gap):.3f}", f"{100 * rule:.1f}"]


def _range(values: Sequence[float]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _accuracies(rows: Rows, model: str, threat: str) -> list[float]:
    return [
        100 * worst(rows, task=task, victim=victim, model=model, threat=threat)["accuracy"]
        for task, victim in cells(rows)
    ]


def _accuracy(row: dict[str, Any]) -> float:
    return float(row["tpr_at_fpr5"] + 1 - row["fpr_at_fpr5"]) / 2


def _attack(row: dict[str, Any]) -> str:
    return str(row["condition"].partition("@")[0])


def _names(sources: list[str]) -> list[str]:
    return [source.rsplit("/", 1)[-1] for source in sources]
