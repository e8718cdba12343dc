"""Compare our attacks with those of torchattacks and adv-lib: same model, images, budget and steps.

    pip install "zepad-mm[attacks]" && pip install --no-deps torchattacks
    python -m benchmarks.attack_parity --n 500

Writes accuracies and seconds to results/parity.json and .md. A killed run resumes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm import ZePAD
from zepad_mm.attacks import APGD, PGD, Attack, MomentumPGD, Square
from zepad_mm.data import load_embedded
from zepad_mm.encoders import optimize_for_inference
from zepad_mm.evaluation.white_box import QUICK_STEPS
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.provenance import provenance

OUT = Path(__file__).parents[1] / "results" / "parity.json"
WORST = "apgd-ce + apgd-t + square"
WHOLE = ", whole defence"  # suffix of attacks on the whole ZePAD; the others attack one branch
DEFAULT = ", its defaults"  # suffix of torchattacks' AutoAttack defaults: 10 steps, with FAB, 5000 Square queries
T2 = "T2 as evaluated, without MORA"  # beside AutoAttack with its defaults
PGD_BATCH = 64  # a power of two, so that torchattacks' mean over the batch is exact

Model = Callable[[Tensor], Tensor]
Run = Callable[[Model, Tensor, Tensor], Tensor]  # model, images, labels to adversarial images


def ours(attacks: list[Attack]) -> Run:
    """Run attacks in sequence, each on the images that the earlier ones left correct."""

    def run(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        worst = images.clone()
        for attack in attacks:
            left = right(model, worst, labels).nonzero()[:, 0]
            worst[left] = attack(model, images[left], labels[left])
        return worst

    return run


def on_an_optimized_copy(run: Run) -> Run:
    """Optimise a copy of the model for inference first, as ``zepad evaluate`` does; its time counts."""

    def run_on_copy(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        assert isinstance(model, nn.Module)
        return run(optimize_for_inference(model, images.shape[-1]), images, labels)

    return run_on_copy


def torchattacks_default(settings: dict[str, Any], classes: int) -> Run:
    """``AutoAttack("standard")`` with its defaults: apgd-ce, apgd-t, fab-t and square."""
    import torchattacks

    def run(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return torchattacks.AutoAttack(model, eps=settings["epsilon"], n_classes=classes, seed=0)(images, labels)

    return run


def torchattacks_auto(settings: dict[str, Any], classes: int) -> Run:
    """AutoAttack's apgd-ce, apgd-t and square with these settings, in sequence."""
    import torchattacks

    def run(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        budget, steps = settings["epsilon"], settings["steps"]
        parts = [
            torchattacks.APGD(model, eps=budget, steps=steps, loss="ce"),
            torchattacks.APGDT(model, eps=budget, steps=steps, n_classes=classes),
            torchattacks.Square(model, eps=budget, n_queries=settings["queries"]),
        ]
        return torchattacks.MultiAttack(parts)(images, labels)

    return run


def adv_lib_apgd(settings: dict[str, Any], loss: str) -> Run:
    from adv_lib.attacks.auto_pgd import apgd

    return lambda model, images, labels: apgd(
        model, images, labels, settings["epsilon"], norm=float("inf"), n_iter=settings["steps"], loss_function=loss
    )


def white_box(settings: dict[str, Any]) -> Run:
    """The own attacks of T2, in the order of the evaluation: cheap ones first, each on what the others left."""
    budget, steps = settings["epsilon"], settings["steps"]
    attacks: list[Attack] = [
        PGD(epsilon=budget, steps=QUICK_STEPS),
        MomentumPGD(epsilon=budget, steps=2 * steps),
        *(APGD(epsilon=budget, steps=steps, loss=loss) for loss in ("ce", "targeted")),
    ]
    return on_an_optimized_copy(ours(attacks))


@torch.no_grad()
def right(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """(n,) bool: whether each prediction is right."""
    return torch.cat([model(part).argmax(-1) for part in images.split(100)]) == labels


def table(settings: dict[str, Any], classes: int) -> dict[str, Run]:
    """The attacks to compare, by name."""

    def worst_case(steps: int, queries: int) -> Run:
        budget = settings["epsilon"]
        ce, targeted = (APGD(epsilon=budget, steps=steps, loss=loss) for loss in ("ce", "targeted"))
        return on_an_optimized_copy(ours([ce, targeted, Square(epsilon=budget, queries=queries)]))

    def one(loss: str) -> Run:
        return on_an_optimized_copy(ours([APGD(epsilon=settings["epsilon"], steps=settings["steps"], loss=loss)]))

    ours_of, theirs_of = worst_case(settings["steps"], settings["queries"]), torchattacks_auto(settings, classes)
    return {
        f"zepad_mm {WORST}": ours_of,
        f"torchattacks {WORST}": theirs_of,
        f"zepad_mm {WORST}{WHOLE}": ours_of,
        f"torchattacks {WORST}{WHOLE}": theirs_of,
        f"zepad_mm {WORST}{DEFAULT}": worst_case(settings["steps"], 10 * settings["queries"]),
        f"torchattacks {WORST}{DEFAULT}": torchattacks_default(settings, classes),
        f"zepad_mm {T2}{DEFAULT}": white_box(settings),
        "zepad_mm apgd-ce": one("ce"),
        "adv_lib apgd-ce": adv_lib_apgd(settings, "ce"),
        "zepad_mm apgd-dlr": one("dlr"),
        "adv_lib apgd-dlr": adv_lib_apgd(settings, "dlr"),
    }


def measure(run: Run, model: Model, images: Tensor, labels: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Robust accuracy, wall and CPU seconds, and the largest change of a pixel."""
    torch.manual_seed(settings["seed"])
    wall, cpu = time.perf_counter(), time.process_time()
    batches = [
        run(model, x, y) for x, y in zip(images.split(settings["batch"]), labels.split(settings["batch"]), strict=True)
    ]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    adversarial = torch.cat(batches).detach()
    kept = right(model, adversarial, labels)
    return {
        "accuracy": float(kept.float().mean()),
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "largest_change": float((adversarial - images).abs().max()),
        "right": "".join(str(int(bit)) for bit in kept),
    }


def pgd_difference(model: Model, images: Tensor, labels: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """The difference of the last iterates of our PGD and torchattacks', without random start."""
    import torchattacks

    images, labels = images[:PGD_BATCH], labels[:PGD_BATCH]
    budget, steps = settings["epsilon"], settings["steps"]
    step = budget / 4
    theirs = torchattacks.PGD(model, eps=budget, alpha=step, steps=steps, random_start=False)(images, labels)
    seen: list[Tensor] = []

    def recorded(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return model(images)

    attack = PGD(epsilon=budget, steps=steps, step_size=step, loss="ce", random_start=False, stop_when_wrong=False)
    attack(recorded, images, labels)
    gap = (seen[-1] - theirs).abs()  # our attack scores its last iterate last
    return {
        "n": len(images),
        "largest_difference": float(gap.max()),
        "unequal_pixels": float((gap > 1e-6).float().mean()),
    }


def markdown(record: dict[str, Any]) -> str:
    """The Markdown table of a record."""
    settings = record["meta"]["config"]
    lines = [
        "# Attacks compared with other libraries",
        "",
        f"Branch `{settings['branch']}` of the shipped model alone, {settings['n']} test images, L-inf "
        f"{settings['epsilon'] * 255:.4g}/255, {settings['steps']} steps per run and target, "
        f"{settings['queries']} queries of Square, one thread ({record['meta']['hardware']}).",
        "*Its defaults* means torchattacks' AutoAttack with its defaults: 10 steps, with FAB-T, "
        f"5000 queries; ours is then run with {settings['steps']} steps, no FAB and "
        f"{10 * settings['queries']} queries.",
        "Made by `python -m benchmarks.attack_parity`.",
        "",
        "| attack | images | robust accuracy | CPU seconds |",
        "|---|---|---|---|",
        f"| none | {settings['n']} | {record['clean'] * 100:.1f} % | |",
    ]
    for name, stage in record["stages"].items():
        cells = (name, len(stage["right"]), f"{stage['accuracy'] * 100:.1f} %", f"{stage['cpu_seconds']:.1f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    pgd, summary = record["pgd"], record["summary"]
    lines += [
        "",
        *(
            f"{which[0].upper()}{which[1:]}: the worst cases of ours and torchattacks' disagree on {found['disagree']} "
            f"images; theirs takes {found['speed_up']:.2f} times the CPU time of ours."
            for which, found in summary.items()
        ),
        f"PGD without random start: the last iterates differ by at most {pgd['largest_difference']:.2g} "
        f"({pgd['unequal_pixels'] * 100:.3g} % of pixels by more than 1e-6).",
    ]
    return "\n".join(lines) + "\n"


def summarize(stages: dict[str, Any]) -> dict[str, Any]:
    """Images on which the worst cases of both libraries disagree, and the ratio of CPU times, where both were run."""
    summary = {}
    pairs = {"T2 and AutoAttack as it comes": (f"zepad_mm {T2}{DEFAULT}", f"torchattacks {WORST}{DEFAULT}")}
    suffixes = {"one branch": "", "the whole defence": WHOLE, "one branch and AutoAttack as it comes": DEFAULT}
    for which, suffix in suffixes.items():
        pairs[which] = f"zepad_mm {WORST}{suffix}", f"torchattacks {WORST}{suffix}"
    for which, names in pairs.items():
        if set(names) <= set(stages):
            ours, theirs = (stages[name] for name in names)
            summary[which] = {
                "disagree": sum(a != b for a, b in zip(ours["right"], theirs["right"], strict=True)),
                "speed_up": theirs["cpu_seconds"] / max(ours["cpu_seconds"], 1e-9),
            }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="test images")
    parser.add_argument("--steps", type=int, default=20, help="gradient steps per run and target")
    parser.add_argument("--queries", type=int, default=200, help="queries of Square")
    parser.add_argument("--few", type=int, default=100, help="test images for the whole defence, and for defaults")
    parser.add_argument("--stages", type=int, default=None, help="stages to run (default: all); a rerun resumes")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    defended = ZePAD.from_pretrained("embedded")
    name = next(branch.name for branch in defended.config.branches if branch.objective.startswith("TeCoA"))
    settings = {
        "branch": name,
        "n": given.n,
        "few": given.few,
        "epsilon": 4 / 255,
        "steps": given.steps,
        "queries": given.queries,
        "batch": 250,
        "seed": 0,
    }
    defended.requires_grad_(False)
    model = defended.branch(name).eval()
    images, labels = load_embedded("test", n=given.n)
    record: dict[str, Any] = {"stages": {}}
    if given.out.is_file():
        earlier = read_json(given.out)
        if earlier["meta"]["config"] == settings:
            record = earlier
    if "pgd" not in record:
        record["meta"] = provenance(seed=0, config=settings)
        record["meta"]["versions"] |= {name: version(name) for name in ("torchattacks", "adv-lib")}
        record["clean"] = float(right(model, images, labels).float().mean())
        record["pgd"] = pgd_difference(model, images, labels, settings)
        write_json(given.out, record)
    for stage, run in list(table(settings, len(defended.class_names)).items())[: given.stages]:
        if stage not in record["stages"]:
            part = slice(given.few if stage.endswith((WHOLE, DEFAULT)) else None)
            target = defended if stage.endswith(WHOLE) else model
            record["stages"][stage] = measure(run, target, images[part], labels[part], settings)
            write_json(given.out, record)
        print(stage, {key: value for key, value in record["stages"][stage].items() if key != "right"}, flush=True)
    record["summary"] = summarize(record["stages"])
    write_json(given.out, record)
    write_text(given.out.with_suffix(".md"), markdown(record))


if __name__ == "__main__":
    main()
