"""The measured part of recipes/README.md, generated from the committed results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.gpu_readme import inference_cost, tuning_cost
from zepad_mm.utils.io import read_json
from zepad_mm.utils.text import markdown_table

RESULTS = Path(__file__).parents[1] / "results"
START = "<!-- tables: written by tools/render_docs.py from results/*.json -->"
END = "<!-- /tables -->"
NAMES = {
    "textbook": "textbook loop",
    "full": "`fit`, all weights",
    "lora": "`fit`, LoRA",
    "lora_bf16": "`fit`, LoRA, bf16",
}


def recipes_readme(old: str) -> str:
    """Return the file with the block between its marks generated again."""
    before, rest = old.split(START)
    blocks = [block for write in (tuning, gpu, half, crafting, scaling, plan, classifier, killed) for block in write()]
    return f"{before}{START}\n\n" + "\n".join(blocks).rstrip() + f"\n\n{END}{rest.split(END)[1]}"


def result(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return read_json(path) if path.is_file() else None


def origin(found: dict[str, Any], script: str) -> str:
    meta = found["meta"]
    return f"`{script}`, commit {meta['commit']}, {meta['hardware']}."


def span(ratio: dict[str, float], low: str = "lowest", high: str = "highest") -> str:
    return f"{ratio['median']:.2f}x ({ratio[low]:.2f}-{ratio[high]:.2f})"


def tuning() -> Iterator[str]:
    for path in sorted(RESULTS.glob("bench_tuning*.json")):
        found = read_json(path)
        config = found["meta"]["config"]
        yield f"### Adversarial tuning of {config['arch']}, FARE with PGD-{config['attack_steps']}\n"
        head = ["", "images per second", "speed", "peak memory", "utilisation", "attack", "rest of the step"]
        lines = []
        for name, title in NAMES.items():
            speed = "1x" if name == "textbook" else span(found["speed_over_textbook"][name])
            memory = f"{found['peak_mb'][name]:.0f} MB"
            if name != "textbook":
                memory += f", {found['memory_over_textbook'][name]:.2f}x"
            step = found["seconds_of_a_step"].get(name)
            seconds = [f"{step[key]:.2f} s" if step else "-" for key in ("attack", "forward_backward_update")]
            share = f"{100 * found['utilisation'][name]:.0f} %"
            lines.append([title, f"{found['images_per_second'][name]:.3g}", speed, memory, share, *seconds])
        yield markdown_table(head, lines)
        products = {kind: value / 1e9 for kind, value in found["product_flops_per_second"].items()}
        yield (
            f"\nBatch {config['batch']}; medians of {config['rounds']} rounds in turns, with their range; utilisation "
            f"against this machine's own matrix product ({products['float32']:.0f} GFLOP/s in fp32, "
            f"{products['bfloat16']:.0f} in bf16); memory above what the process held before. "
            f"{origin(found, 'benchmarks/tuning.py')}\n"
        )


def gpu() -> Iterator[str]:
    yield "### Adversarial tuning on one GPU\n"
    yield from (f"{block}\n" for block in tuning_cost("####", "eager"))
    yield "### Inference on one GPU\n"
    yield from (f"{block}\n" for block in inference_cost(precision="bf16", batch=256))
    yield "What follows from these, and a study of a ResNet-18: [results/gpu](../results/gpu/README.md).\n"


def half() -> Iterator[str]:
    if not (found := result("bf16")):
        return
    config = found["meta"]["config"]
    yield "### Attacks in bf16\n"
    lines = []
    for row in found["rows"]:
        cells = [
            f"{100 * row[kind]['accuracy']:.1f} % ({100 * row[kind]['ci_low']:.1f}-{100 * row[kind]['ci_high']:.1f})"
            for kind in ("fp32", "bf16")
        ]
        lines.append([row["model"], *cells, f"{row['points_between']:+}", str(row["pictures_that_differ"])])
    head = ["robust accuracy of", "attacked in fp32", "attacked in bf16", "between", "images that differ"]
    yield markdown_table(head, lines)
    yield (
        f"\nPGD-{config['steps']} on the margin, {255 * config['epsilon']:.0f}/255, n = {found['rows'][0]['n']}, "
        f"judged in fp32. {origin(found, 'benchmarks/bf16_attacks.py')}\n"
    )


def crafting() -> Iterator[str]:
    if not (found := result("bench_crafting")):
        return
    config = found["meta"]["config"]
    yield f"### Crafting universal perturbations on {config['source'].removeprefix('open_clip:')}\n"
    lines = []
    for row in found["rows"]:
        pace, loss = row["images_per_second"], row["final_loss"]
        losses = f"{loss['straightforward']:.4g} / {loss['ours']:.4g}"
        lines.append([row["attack"], str(pace["straightforward"]), str(pace["ours"]), span(row["speed"]), losses])
    head = ["attack", "straightforward, images per second", "ours", "speed", "loss at the end, straightforward / ours"]
    yield markdown_table(head, lines)
    yield (
        f"\n{config['steps']} steps of {config['batch']} images; medians of {config['rounds']} rounds in turns. "
        f"{origin(found, 'benchmarks/crafting.py')}\n"
    )


def scaling() -> Iterator[str]:
    if not (found := result("bench_scaling")):
        return
    config = found["meta"]["config"]
    yield "### Two processes on the cores of one, and communication between GPUs\n"
    yield (
        f"`tune.py` on the embedded CLIP, batch {config['batch']}: two processes do "
        f"{span(found['two_over_one'], 'min', 'max')} of the images per second of one. "
        f"{origin(found, 'benchmarks/scaling.py')}\n"
    )
    lines = []
    for row in found["communication"]:
        name = f"{row['source'].removeprefix('open_clip:')}, {row['adaptation']}"
        sizes = [f"{row['gradient_mb']} MB", f"{row['sent_by_each_mb']} MB"]
        lines.append([name, str(row["gpus"]), *sizes, f"{row['milliseconds']} ms"])
    yield markdown_table(["gradients of", "GPUs", "to average", "each sends per step", "estimated"], lines)
    yield "\nRing all-reduce, fp32, at 450 GB/s within a node of 8 and 50 GB/s between nodes: not measured.\n"


def plan() -> Iterator[str]:
    if not (found := result("bench_plan")):
        return
    yield "### Accuracy of `--plan`\n"
    lines = [
        [f"{row['defence']}, {row['adaptation']}", f"{row['plan_s']} s", f"{row['run_s']} s", f"{row['ratio']:.2f}"]
        for row in found["rows"]
    ]
    yield markdown_table(["run", "estimated", "measured", "estimated / measured"], lines)
    yield f"\n{origin(found, 'benchmarks/cost.py')}\n"


def classifier() -> Iterator[str]:
    if not (found := result("classifier_speed")):
        return
    yield f"### The classifier, {found['model']}, batch {found['meta']['config']['batch']}\n"
    lines = [[name.removeprefix("time of "), span(ratio)] for name, ratio in found["ratios"].items()]
    lines += [[f"(weights) {name}", f"{ratio:.2f}x"] for name, ratio in found["weights"].items()]
    yield markdown_table(["time of", "ratio (range)"], lines)
    yield f"\n{origin(found, 'benchmarks/classifier.py')}\n"


def killed() -> Iterator[str]:
    if not (found := result("kill_tune")):
        return
    yield "### Killed and resumed\n"
    for title in (key for key in found if key != "meta"):
        row = found[title]
        yield (
            f"- {title}: {row['kills']} times `kill -9` at random moments, {row['after_a_checkpoint']} times with a "
            f"checkpoint to resume from; of {row['runs']} runs {row['different']} ended with other weights or metrics "
            "than an uninterrupted run, compared bit for bit."
        )
    yield f"\n{origin(found, 'benchmarks/kill_tune.py')}\n"
