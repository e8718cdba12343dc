"""The measured part of results/gpu/README.md, generated from the records beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zepad_mm.evaluation.threats import CLEAN, T1, T1B
from zepad_mm.utils.io import read_json
from zepad_mm.utils.text import bullets, interval_text, markdown_table, percent

GPU = Path(__file__).parents[1] / "results" / "gpu"
START = "<!-- tables: written by tools/render_docs.py from results/gpu/*.json -->"
END = "<!-- /tables -->"
TASKS = ("cifar10", "gtsrb")
DEFENCES = (
    "paper (corrected gen_af)",
    "paper (as released)",
    "ours (fare)",
    "ours (fare with labels)",
    "corrected gen_af, our benign branch",
)
RULES = ("RFDM", "bounded_benign 0.2", "capped_rfdm 0.35")
AIMED_AT = 0.8  # linear probe that the victim was meant to reach


def gpu_readme(old: str) -> str:
    """The file with the block between its marks generated again."""
    before, rest = old.split(START)
    study = read_json(GPU / "resnet18.json")
    universal = {task: read_json(GPU / f"universal_{task}.json") for task in TASKS}
    blocks = [
        setup(study),
        "## What falls short\n\n" + bullets(shortcomings(study, universal)),
        *encoders(study),
        *(block for task in TASKS for block in universal_attacks(task, universal[task]["rows"])),
        *white_box(study),
        *detection(),
        *tunings(study),
        *crafting(study),
        "## Cost of adversarial tuning",
        *tuning_cost(),
        "## Cost of inference",
        *inference_cost(),
        "## Findings on cost and precision\n\n" + bullets(findings(study)),
    ]
    return f"{before}{START}\n\n" + "\n\n".join(blocks) + f"\n\n{END}{rest.split(END)[1]}"


# ---- setup and limits -----------------------------------------------------------------------------------------------


def setup(study: dict[str, Any]) -> str:
    meta, clock = study["meta"], study["wall_s"]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version[0].isdigit())
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.items() if name != "total")
    return (
        f"Commit {meta['commit']}, seed {meta['seed']}, one run of each, {meta['hardware']}; {versions}.\n\n"
        f"The study took {clock['total']:.0f} s: {stages}. During its first part a short run of the benchmark used the "
        f"same GPU.\n\nData: {meta['config']['data']}. All intervals are 95 % Wilson intervals over the test images; "
        "they do not cover the choice of the seed."
    )


def shortcomings(study: dict[str, Any], universal: dict[str, Any]) -> Iterator[str]:
    encoder, tuned = study["pretraining"], study["tuning"]
    robust = {name: run for name, run in tuned.items() if "+clean" not in name}
    steps, epochs = [run["steps"] for run in robust.values()], [run["epochs"] for run in robust.values()]
    cifar, gtsrb = (accuracies(universal[task]["rows"]) for task in TASKS)
    white_box = {row["model"]: row["accuracy"] for row in study["white_box"]}
    alone, ours = "branch adv_au+fare alone", "ours (fare): bounded_benign 0.2"
    first = ("undefended", CLEAN.key, "none")
    yield (
        f"The victim is weak: its linear probe reaches {probe_text(encoder['victim'], 'linear')} %, "
        f"{percent(AIMED_AT)} % were aimed at. The auxiliary encoder was pre-trained with labels "
        f"({encoder['adv_au']['method']}), since the time did not allow for a method without."
    )
    yield (
        f"Adversarial tuning is short: {min(steps)} to {max(steps)} steps, {min(epochs)} to {max(epochs)} epochs, with "
        f"PGD-{robust['victim+fare']['defence']['attack_steps']}, about the same time for each objective. The paper "
        "tunes for 20 epochs with PGD-10. The corrected Gen-AF is far from converged, so its comparison with FARE "
        "holds for this budget only."
    )
    yield (
        f"On GTSRB clean accuracy falls from {percent(gtsrb[first])} % to {percent(gtsrb[ours, CLEAN.key, 'none'])} % "
        f"({ours}), {percent(gtsrb['paper (corrected gen_af): RFDM', CLEAN.key, 'none'])} % and "
        f"{percent(gtsrb['paper (as released): RFDM', CLEAN.key, 'none'])} % (the paper's, corrected and as released)."
    )
    yield (
        "The fusion rule was not selected on validation images: all rules are in the tables. "
        '"ours" differs from "paper" in the objective and in the benign branch, which is tuned on clean labelled '
        'images of the defender; the rows "corrected gen_af, our benign branch" separate the two.'
    )
    yield (
        f"On CIFAR-10 one branch alone, the auxiliary encoder tuned by FARE, is more robust than every fusion: "
        f"{percent(cifar[alone, T1.key, 'worst'])} % under T1 and {percent(white_box[alone])} % under T2, against at "
        f"most {percent(best_fusion(cifar, T1.key, 'worst'))} % and "
        f"{percent(max(value for name, value in white_box.items() if name.startswith(DEFENCES)))} % (under T2 the "
        "intervals overlap). The T1 attacker does not know it, and it was pre-trained with labels. On GTSRB it has "
        f"{percent(gtsrb[alone, CLEAN.key, 'none'])} % on clean images."
    )
    yield (
        f"Clean accuracy above the undefended victim's {percent(cifar[first])} % on CIFAR-10 is no merit of the "
        "defence: the victim tuned on clean images reaches "
        f"{percent(cifar['branch victim+clean alone', CLEAN.key, 'none'])} %, "
        f"three untuned encoders {percent(cifar['control: three untuned, equal', CLEAN.key, 'none'])} %."
    )
    yield (
        f"T2 is one PGD per row and the examples of all other rows, on {study['white_box'][0]['n']} images of "
        "CIFAR-10, so it is an upper bound of robust accuracy."
    )
    yield "Convolutions used TF32 in evaluation and attacks. CIFAR-10 and GTSRB were read from JPEG copies."
    yield (
        "Inference was timed as features of image encoders, without heads, fusion and text tower; LoRA was timed "
        "unmerged."
    )


def accuracies(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """(model, threat, attack) -> accuracy."""
    return {(row["model"], row["threat"], row["attack"]): row["accuracy"] for row in rows}


def best_fusion(found: dict[tuple[str, str, str], float], threat: str, attack: str) -> float:
    return max(
        value for (model, *rest), value in found.items() if rest == [threat, attack] and model.startswith(DEFENCES)
    )


def probe_text(about: dict[str, Any], kind: str) -> str:
    return interval(about["probe"][kind])


def interval(row: dict[str, Any]) -> str:
    return interval_text(row["accuracy"], row["ci_low"], row["ci_high"])


# ---- the study ------------------------------------------------------------------------------------------------------


def encoders(study: dict[str, Any]) -> Iterator[str]:
    yield "## Encoders"
    config = study["pretraining"]["victim"]
    yield (
        f"{study['meta']['config']['encoder']}; batch {config['batch_size']}, {config['optimizer']}, "
        f"{config['precision']}. Accuracies in % on {config['probe']['n_test']} test images, of features of the "
        "frozen encoder."
    )
    lines = [
        [name, about["method"], str(about["n_train"]), f"{about['epochs']:.0f}", f"{about['seconds']:.0f}",
         str(about["images_per_s"]), str(about["peak_mb"]), *(probe_text(about, kind) for kind in PROBES)]
        for name, about in study["pretraining"].items()
    ]  # fmt: skip
    head = ["encoder", "method", "images", "epochs", "s", "images/s", "peak MB", *PROBES.values()]
    yield markdown_table(head, lines)


PROBES = {"knn": "kNN", "ridge": "ridge", "linear": "linear probe"}


def universal_attacks(task: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table of T1 on one task: clean accuracy, each attack, and the worst case per image."""
    cells = {(row["model"], row["threat"], row["attack"]): row for row in rows}
    attacks = list(dict.fromkeys(row["attack"] for row in rows if "asr" in row))
    yield f"## {task}: one perturbation for all images, n = {rows[0]['n']}"
    yield (
        'Accuracy in %, with the attack success rate (share of all answers that change) behind the slash. "Worst" is '
        "per image over all attacks; T1b adds perturbations made on the encoders of the defences."
    )
    lines = [
        [
            model,
            interval(cells[model, CLEAN.key, "none"]),
            *(
                f"{percent(row['accuracy'])} / {percent(row['asr'])}"
                for row in (cells[model, T1.key, attack] for attack in attacks)
            ),
            interval(cells[model, T1.key, "worst"]),
            interval(cells[model, T1B.key, "worst with T1"]),
        ]
        for model in models_shown(rows)
    ]
    yield markdown_table(["model", "clean", *attacks, "T1, worst", "T1 and T1b, worst"], lines)


def models_shown(rows: list[dict[str, Any]]) -> list[str]:
    """Undefended, the defences by rule, the control, and the branches alone."""
    present = dict.fromkeys(row["model"] for row in rows)
    fused = [f"{defence}: {rule}" for defence in DEFENCES for rule in RULES]
    return ["undefended", *(name for name in fused if name in present), *(
        name for name in present if name != "undefended" and name not in fused
    )]  # fmt: skip


def white_box(study: dict[str, Any]) -> Iterator[str]:
    rows, config = study["white_box"], study["meta"]["config"]
    yield "## cifar10: white-box attack (T2)"
    yield (
        f"PGD-20 on the margin, {255 * config['epsilon_white_box']:.0f}/255, n = {rows[0]['n']}; worst case per image "
        "over the examples made on all rows."
    )
    cells = {row["model"]: interval(row) for row in rows}
    yield markdown_table(["model", "accuracy, %"], [[name, cells[name]] for name in models_shown(rows)])


def detection() -> Iterator[str]:
    record = read_json(GPU / "detection.json")
    rows = [dict(zip(record["columns"], row, strict=True)) for row in record["rows"]]
    yield "## Detection by disagreement of the branches"
    yield (
        "Lowest to highest over the attacks of T1 and T1b, RFDM; 0.5 is chance. The true positive rate is that at 5 % "
        "false positives, with the threshold from validation images."
    )
    groups = dict.fromkeys((row["task"], row["model"], row["score"]) for row in rows)
    lines = []
    for group in groups:
        own = [row for row in rows if (row["task"], row["model"], row["score"]) == group]
        values = ([row[key] for row in own] for key in ("auroc", "tpr_at_fpr5"))
        auroc, rate = ((min(found), max(found)) for found in values)
        lines.append(
            [*group, f"{auroc[0]:.2f}-{auroc[1]:.2f}", f"{percent(rate[0])}-{percent(rate[1])}"],
        )
    yield markdown_table(["task", "model", "score", "AUROC", "true positive rate, %"], lines)


def tunings(study: dict[str, Any]) -> Iterator[str]:
    yield "## Tuning of the branches"
    config = study["tuning"]["victim+fare"]
    yield (
        f"Batch {config['batch_size']}, learning rate {config['lr_encoder']}, {config['precision']}. "
        '"clean_own" is tuned on the half of the data that only the defender has; "released" ran as the authors\' code '
        "does, without augmentation and gradient clipping, and kept its last weights."
    )
    scores = study["validation_score_of_victim_branches"]
    lines = [
        [name, str(run["steps"]), str(run["epochs"]), f"{run['images_per_s']:.0f}", str(run["seconds"]),
         str(run["peak_mb"]), percent(scores[name]) if name in scores else "-"]
        for name, run in study["tuning"].items()
    ]  # fmt: skip
    head = [
        "encoder+objective",
        "steps",
        "epochs",
        "images/s",
        "s",
        "peak MB",
        "validation, mean of clean and T1 worst, %",
    ]
    yield markdown_table(head, lines)


def crafting(study: dict[str, Any]) -> Iterator[str]:
    yield "## Crafting the perturbations"
    about, control = study["meta"]["config"], study["control"]
    lines = [
        [name, str(found["steps"]), f"{found['wall_s']:.1f}", f"{found['final_loss']:.3f}"]
        for name, found in study["attacks"].items()
    ]
    yield (
        f"{255 * about['epsilon_universal']:.0f}/255, on {next(iter(study['attacks'].values()))['images']} public "
        f"images without labels. Random signs of that size leave the undefended victim {interval(control)} % "
        "on CIFAR-10."
    )
    yield markdown_table(["attack", "steps", "s", "final loss"], lines)


# ---- cost -----------------------------------------------------------------------------------------------------------


def span(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['lowest']:.2f}-{ratio['highest']:.2f})"


def tuning_cost(heading: str = "###", kind: str | None = None) -> Iterator[str]:
    """A table for each run of the tuning benchmark, or for each of one kind: "eager", "compiled"."""
    record = read_json(GPU / "tuning.json")
    products = record["runs"][0]["matrix_product_tflops"]
    yield (
        f"{record['meta']['config']['what']}; medians, ratios with their range. {record['meta']['config']['note']}. "
        f"Matrix products of this card: {', '.join(f'{value} TFLOP/s in {kind}' for kind, value in products.items())}. "
        f"{record['meta']['hardware']}, commit {record['meta']['commit']}."
    )
    for run in (run for run in record["runs"] if kind in (None, run["run"])):
        bases = list(run["speed_over"])
        columns = {
            "peak MiB": run["peak_mib"],
            "GPU busy, %": run["gpu_utilisation_percent"],
            "of the matrix product, %": {
                name: percent(share) for name, share in run["share_of_matrix_product_rate"].items()
            },
            "first step, s": run["first_step_s"],
        }
        columns = {title: values for title, values in columns.items() if values}
        lines = [
            [
                name,
                str(pace),
                *(span(run["speed_over"][base][name]) if name != base else "1x" for base in bases),
                *(str(values.get(name, "-")) for values in columns.values()),
            ]
            for name, pace in run["images_per_s"].items()
        ]
        steps = f"PGD-{run['attack_steps']}, batch {run['batch']}, {run['rounds']} rounds"
        yield f"{heading} {run['arch']}, {run['run']}: {steps}"
        yield markdown_table(["variant", "images/s", *(f"speed over {base}" for base in bases), *columns], lines)
        if cold := run.get("first_step_with_an_empty_compiler_cache_s"):
            seconds = ", ".join(f"{name} {value:.0f} s" for name, value in cold.items())
            yield f"The graphs were in the compiler's cache; the first step with an empty cache: {seconds}."


def inference_cost(**kind: Any) -> Iterator[str]:
    """The table of inference, or its rows of one kind, such as ``precision="bf16"``."""
    record = read_json(GPU / "inference.json")
    meta = record["meta"]
    yield f"{meta['config']['what']}; {meta['config']['note']}. {meta['hardware']}, commit {meta['commit']}."
    lines = [
        [row["arch"], row["precision"], str(row["batch"]), row["variant"], str(row["images_per_s"]),
         span(row["time_over_one"]), span(row["time_over_three"]), f"{row['weights_ratio']:.2f}x"]
        for row in record["rows"]
        if all(row[key] == value for key, value in kind.items())
    ]  # fmt: skip
    head = [
        "model",
        "precision",
        "batch",
        "variant",
        "images/s",
        "time over one encoder",
        "over three encoders",
        "weights",
    ]
    yield markdown_table(head, lines)


def findings(study: dict[str, Any]) -> Iterator[str]:
    """What the tables of cost say, in sentences."""
    runs = {(run["arch"], run["run"]): run for run in read_json(GPU / "tuning.json")["runs"]}
    small = runs["ViT-B-32", "eager"]
    speeds = [
        run["speed_over"]["textbook_bf16"]["full_bf16"]["median"]
        for (arch, _), run in runs.items()
        if arch == "ViT-B-32"
    ]
    busy = small["gpu_utilisation_percent"]["full_bf16"]
    yield (
        f"ViT-B-32, bf16: the step of `fit` keeps the GPU {busy:.0f} % busy, so it is probably bound by the host; it "
        f"is as fast as the textbook loop ({', '.join(f'{speed:.2f}x' for speed in speeds)} in {len(speeds)} runs). On "
        f"ViT-L-14 it is {span(runs['ViT-L-14', 'eager']['speed_over']['textbook_bf16']['full_bf16'])}."
    )
    memory = small["peak_mib"]
    yield (
        "LoRA is not faster than full tuning on this card, and in bf16 on ViT-B-32 it needs no less memory "
        f"({memory['lora_bf16']} against {memory['full_bf16']} MiB)."
    )
    rows = read_json(GPU / "inference.json")["rows"]
    whole = [row["time_over_three"]["median"] for row in rows if "from block 0" in row["variant"]]
    weights = [row["weights_ratio"] for row in rows if "from block 0" in row["variant"]]
    yield (
        f"LoRA branches over all blocks of a shared trunk, unmerged, take {min(whole):.1f} to {max(whole):.1f} times "
        f"the time of three separate encoders: they save weights ({min(weights):.2f}x to {max(weights):.2f}x of one "
        "encoder), not time."
    )
    released = study["tuning"]["victim+released"]["validation"]
    after = next(row for row in study["white_box"] if row["model"] == "branch victim+released alone")
    yield (
        "`gen_af_released` validates with the attack of the released code, on pixels without mean and std: "
        f"{percent(released['robust'])} % robust accuracy at epsilon {released['epsilon']}, where a white-box attack "
        f"on the true network at the smaller {255 * study['meta']['config']['epsilon_white_box']:.0f}/255 leaves "
        f"{percent(after['accuracy'])} % (with a clean head)."
    )
    yield (
        "`optimize_for_inference` left every ResNet as it was: the folded copies differed by more than its tolerance "
        "of 1e-4, most likely since convolutions round to TF32 (not tried without TF32). All crafting "
        "and evaluation ran unfolded."
    )
    yield (
        "Under bf16 autocast the topology term of Gen-AF computed its cosines in bf16 at that commit; the study "
        "computed them in fp32, as the package does since."
    )
