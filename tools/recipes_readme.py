"""The measured part of recipes/README.md, generated from the committed results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.gpu_readme import inference_cost, tuning_cost
from zepad_mm.utils.io import read_json

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
    """The file with the block between its marks generated again."""
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
        yield "| | images per second | speed | peak memory | utilisation | attack | rest of the step |"
        yield "|---|---|---|---|---|---|---|"
        for name, title in NAMES.items():
            speed = "1x" if name == "textbook" else span(found["speed_over_textbook"][name])
            memory = f"{found['peak_mb'][name]:.0f} MB"
            if name != "textbook":
                memory += f", {found['memory_over_textbook'][name]:.2f}x"
            parts = found["seconds_of_a_step"].get(name)
            seconds = f"{parts['attack']:.2f} s | {parts['forward_backward_update']:.2f} s" if parts else "- | -"
            share = f"{100 * found['utilisation'][name]:.0f} %"
            yield f"| {title} | {found['images_per_second'][name]:.3g} | {speed} | {memory} | {share} | {seconds} |"
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
    yield "| robust accuracy of | attacked in fp32 | attacked in bf16 | between | images that differ |"
    yield "|---|---|---|---|---|"
    for row in found["rows"]:
        cells = [
            f"{100 * row[kind]['accuracy']:.1f} % ({100 * row[kind]['ci_low']:.1f}-{100 * row[kind]['ci_high']:.1f})"
            for kind in ("fp32", "bf16")
        ]
        yield f"| {row['model']} | {' | '.join(cells)} | {row['points_between']:+} | {row['pictures_that_differ']} |"
    yield (
        f"\nPGD-{config['steps']} on the margin, {255 * config['epsilon']:.0f}/255, n = {found['rows'][0]['n']}, "
        f"judged in fp32. {origin(found, 'benchmarks/bf16_attacks.py')}\n"
    )


def crafting() -> Iterator[str]:
    if not (found := result("bench_crafting")):
        return
    config = found["meta"]["config"]
    yield f"### Crafting universal perturbations on {config['source'].removeprefix('open_clip:')}\n"
    yield "| attack | straightforward, images per second | ours | speed | loss at the end, straightforward / ours |"
    yield "|---|---|---|---|---|"
    for row in found["rows"]:
        pace, loss = row["images_per_second"], row["final_loss"]
        yield (
            f"| {row['attack']} | {pace['straightforward']} | {pace['ours']} | {span(row['speed'])} | "
            f"{loss['straightforward']:.4g} / {loss['ours']:.4g} |"
        )
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
    yield "| gradients of | GPUs | to average | each sends per step | estimated |"
    yield "|---|---|---|---|---|"
    for row in found["communication"]:
        yield (
            f"| {row['source'].removeprefix('open_clip:')}, {row['adaptation']} | {row['gpus']} | "
            f"{row['gradient_mb']} MB | {row['sent_by_each_mb']} MB | {row['milliseconds']} ms |"
        )
    yield "\nRing all-reduce, fp32, at 450 GB/s within a node of 8 and 50 GB/s between nodes: not measured.\n"


def plan() -> Iterator[str]:
    if not (found := result("bench_plan")):
        return
    yield "### Accuracy of `--plan`\n"
    yield "| run | estimated | measured | estimated / measured |"
    yield "|---|---|---|---|"
    for row in found["rows"]:
        title = f"{row['defence']}, {row['adaptation']}"
        yield f"| {title} | {row['plan_s']} s | {row['run_s']} s | {row['ratio']:.2f} |"
    yield f"\n{origin(found, 'benchmarks/cost.py')}\n"


def classifier() -> Iterator[str]:
    if not (found := result("classifier_speed")):
        return
    yield f"### The classifier, {found['model']}, batch {found['meta']['config']['batch']}\n"
    yield "| time of | ratio (range) |"
    yield "|---|---|"
    for name, ratio in found["ratios"].items():
        yield f"| {name.removeprefix('time of ')} | {span(ratio)} |"
    for name, ratio in found["weights"].items():
        yield f"| (weights) {name} | {ratio:.2f}x |"
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
