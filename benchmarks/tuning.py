#!/usr/bin/env python
"""Speed of adversarial tuning: a step of ``fit`` compared with a straightforward loop as in a paper's code.

    python -m benchmarks.tuning                           # results/bench_tuning.json: CPU, some minutes
    python -m benchmarks.tuning --device cuda --batch 256 --out results/bench_tuning_h200.json
    python -m benchmarks.tuning --device cuda --arch ViT-L-14 --batch 32 --out results/bench_tuning_l14.json \\
        --variants textbook_tf32 textbook_bf16 full_tf32 full_bf16 full_bf16_compile lora_bf16
    python -m benchmarks.tuning --small                   # seconds, to check that it runs

FARE with PGD-10 on open_clip's ViT-B-32 of random weights (no weights are needed to measure time), the same batch for
all:

- textbook: ``loss.backward()`` through the trainable model at every step of the attack, which fills gradients that
  nobody uses; the clean embeddings computed again by a frozen copy at every step; normalisation in the loop;
- full, lora, lora_bf16: the step of ``fit`` itself, with clean targets computed once before.

A name may also end in a precision, _fp32 (no TF32), _tf32 or _bf16 (autocast), and in _compile (inductor). On a GPU the
share of time in which it is busy is sampled too.

The variants take turns, round after round in one process, so that a busy machine slows all of them alike; ratios are
medians over the rounds. Peak memory is measured in a process per variant, above what it held before the model was
built. Utilisation is counted operations over time, relative to the machine's own matrix product.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from zepad_mm.data import LabelledImages
from zepad_mm.defences import FARE, Batch, Student
from zepad_mm.encoders import LoraSettings, add_lora, load_encoder
from zepad_mm.models.heads import LinearHead
from zepad_mm.training import TrainSettings
from zepad_mm.training.cost import count_flops, peak_process_mb
from zepad_mm.training.loop import Trainer
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
VARIANTS = ("textbook", "full", "lora", "lora_bf16")
KINDS = ("textbook", "full", "lora")
PRECISIONS = ("fp32", "tf32", "bf16")
EPSILON = 4 / 255


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="ViT-B-32", help="a model name of open_clip")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", default="no", help="backend of torch.compile for fit")
    parser.add_argument("--small", action="store_true", help="one round, a batch of 2, 2 attack steps")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), type=variant, metavar="NAME")
    parser.add_argument("--memory", type=variant, help="only print the peak memory of this variant, in MB")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench_tuning.json")
    args = parser.parse_args()
    if not args.variants[0].startswith("textbook"):
        parser.error(f"--variants: expected a textbook loop first, to compare with; got {args.variants[0]}")
    if args.small:
        args.batch, args.rounds, args.attack_steps = 2, 1, 2
    return args


def variant(name: str) -> str:
    """Return the name of a variant. Raises ArgumentTypeError for any other."""
    kind, *words = name.split("_")
    if kind not in KINDS or any(word not in (*PRECISIONS, "compile") for word in words):
        raise argparse.ArgumentTypeError(
            f"expected KIND[_PRECISION][_compile] of {', '.join(KINDS)} and {', '.join(PRECISIONS)}, got {name!r}"
        )
    return name


def precision_of(name: str) -> str:
    """Return the precision in a name: "fp32", "tf32" or "bf16"; "" for torch's default."""
    return next((word for word in name.split("_") if word in PRECISIONS), "")


def allow_tf32(name: str) -> None:
    """Set whether the next steps may round to TF32; torch's default, convolutions only, where the name does not say."""
    precision = precision_of(name)
    torch.backends.cuda.matmul.allow_tf32 = precision in ("tf32", "bf16")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def step_of(
    name: str, args: argparse.Namespace, data: LabelledImages, out: Path
) -> tuple[Callable[[], None], Trainer | None]:
    """Return a step of a variant, and its trainer unless it is the textbook loop."""
    allow_tf32(name)
    if not name.startswith("textbook"):
        return fit_step(name, args, data, out)
    plain = textbook(args, data)

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=precision_of(name) == "bf16"):
            plain()

    return step, None


def textbook(args: argparse.Namespace, data: LabelledImages) -> Callable[[], None]:
    """Return a step of the straightforward loop."""
    encoder = load_encoder(f"open_clip:{args.arch}", pretrained=False).to(args.device)
    original = copy.deepcopy(encoder).eval().requires_grad_(False)
    model, preprocess = encoder.backbone.train(), encoder.preprocess
    mean, std = (torch.tensor(v, device=args.device).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5)
    step_size = 2.5 * EPSILON / args.attack_steps

    def step() -> None:
        x = data.images.to(args.device)
        with torch.no_grad():
            clean = original.backbone((x - mean) / std)
        delta = torch.empty_like(x).uniform_(-EPSILON, EPSILON)
        for _ in range(args.attack_steps):
            delta.requires_grad_(True)
            loss = (model((x + delta - mean) / std) - clean).pow(2).sum(1).mean()
            loss.backward()
            assert delta.grad is not None
            delta = (delta + step_size * delta.grad.sign()).clamp(-EPSILON, EPSILON)
            delta = ((x + delta).clamp(0, 1) - x).detach()
        optimizer.zero_grad()
        loss = (model((x + delta - mean) / std) - clean).pow(2).sum(1).mean()
        loss.backward()
        optimizer.step()

    return step


def fit_step(
    name: str, args: argparse.Namespace, data: LabelledImages, out: Path
) -> tuple[Callable[[], None], Trainer]:
    """Return a step of ``fit``, and its trainer."""
    encoder = load_encoder(f"open_clip:{args.arch}", pretrained=False)
    if name.startswith("lora"):
        add_lora(encoder, LoraSettings(rank=8))
    head = LinearHead(encoder.feature_dim, len(data.class_names)).requires_grad_(False)
    compiled: Any = "inductor" if name.endswith("_compile") else args.compile
    settings = TrainSettings(steps=10**6, batch_size=args.batch, lr_encoder=1e-5, compile=compiled)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process runs with two precisions
    accelerator = Accelerator(
        cpu=args.device == "cpu", mixed_precision="bf16" if precision_of(name) == "bf16" else "no"
    )
    defence = FARE(epsilon=EPSILON, attack_steps=args.attack_steps)
    run = Trainer(Student(encoder, head), data, defence, settings, out=out, accelerator=accelerator)
    run.encode_clean_targets()
    batch = Batch(data.images.to(run.device), data.labels.to(run.device), torch.arange(args.batch), run.targets)

    def step() -> None:
        run.step(0, batch)

    return step, run


def main() -> None:
    args = parse()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    size = open_clip.get_model_config(args.arch)["vision_cfg"]["image_size"]
    images = torch.rand(args.batch, 3, size, size)
    data = LabelledImages(images, torch.zeros(args.batch, dtype=torch.long), ("one", "two"), "noise")
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            print(json.dumps(peak_mb(args, data, Path(folder))))
            return
        measured = measure(args, data, Path(folder))
    times, operations = measured["seconds"], measured["flops_of_a_step"]
    peak = product_rates(args.device)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    memory = {name: measured_memory(name) for name in times}
    bases = [name for name in times if name.startswith("textbook")]
    speed = {base: {name: ratio(times[base], times[name]) for name in times if name != base} for base in bases}
    config = {key: value for key, value in vars(args).items() if key not in ("out", "memory")}
    record = {
        "meta": {**provenance(seed=0, config=config), "torch_threads": torch.get_num_threads()},
        "images_per_second": {name: round(args.batch / median, 3) for name, median in medians.items()},
        "speed_over_textbook": speed[bases[0]],
        **({"speed_over": speed} if len(bases) > 1 else {}),
        "peak_mb": memory,
        "memory_over_textbook": {name: round(memory[name] / memory[bases[0]], 3) for name in args.variants[1:]},
        **measured,
        "product_flops_per_second": {kind: round(value / 1e9, 1) * 1e9 for kind, value in peak.items()},
        "utilisation": {
            name: round(count / medians[name] / peak[product_of(name, peak)], 3) for name, count in operations.items()
        },
    }
    write_json(args.out, record)
    for key in ("images_per_second", "speed_over_textbook", "memory_over_textbook", "seconds_of_a_step", "utilisation"):
        print(f"{key}: {record[key]}")


def measure(args: argparse.Namespace, data: LabelledImages, folder: Path) -> dict[str, Any]:
    """Return the times of all variants in turns, their first steps, where time goes, and the operations of a step."""
    steps: dict[str, Callable[[], None]] = {}
    runs: dict[str, Trainer] = {}
    first: dict[str, float] = {}
    for name in args.variants:
        steps[name], run = step_of(name, args, data, folder / name)
        first[name] = round(seconds(steps[name], args.device), 2)
        runs |= {name: run} if run else {}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 1):
        for name, step in steps.items():
            allow_tf32(name)
            taken = seconds(step, args.device)
            if number:  # the first round warms up
                times[name].append(taken)
    found: dict[str, Any] = {
        "seconds": {name: [round(value, 4) for value in taken] for name, taken in times.items()},
        "first_step_s": first,
        "seconds_of_a_step": {},
    }
    if on_gpu(args.device):
        found["gpu_busy_percent"] = {name: gpu_busy(name, step) for name, step in steps.items()}
    for name, run in runs.items():
        allow_tf32(name)
        found["seconds_of_a_step"][name] = time_breakdown(run, data.images, args)
    eager = {name: step for name, step in steps.items() if not name.endswith("_compile")}
    found["flops_of_a_step"] = {name: count_flops(step) for name, step in eager.items()}
    return found


def on_gpu(device: str) -> bool:
    return device.startswith("cuda")


def synchronised(device: str) -> float:
    if on_gpu(device):
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], Any], device: str) -> float:
    began = synchronised(device)
    run()
    return synchronised(device) - began


def time_breakdown(run: Trainer, images: torch.Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of the attack, of the rest of a step, of fetching data, and of the cached clean target."""
    from zepad_mm.training.dataloader import shares

    device, labels = run.device, torch.zeros(len(images), dtype=torch.long)
    with torch.no_grad(), run.accelerator.autocast():
        target = seconds(lambda: run.student.encoder(images.to(device)), args.device)
        targets = run.student.encoder(images.to(device)).float()
    batch = Batch(images.to(device), labels.to(device), torch.arange(len(images)), targets)
    generator = torch.Generator().manual_seed(0)
    run.student.eval()
    with run.accelerator.autocast():
        attack = seconds(lambda: run.defence.craft(run.student, batch, EPSILON, generator), args.device)
    whole = seconds(lambda: run.step(0, batch), args.device)
    batches = shares(run.train, run.settings, 0, 1, 0, 4, False)
    data = seconds(lambda: next(batches), args.device)
    taken = {"attack": attack, "forward_backward_update": whole - attack, "data": data, "clean_target_saved": target}
    return {name: round(value, 4) for name, value in taken.items()}


def gpu_busy(name: str, step: Callable[[], None], duration: float = 0.8) -> float | None:
    """Return the share of time in percent in which the GPU works, as the driver reports it; None where it does not."""
    allow_tf32(name)
    samples: list[int] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.05):
            try:
                samples.append(torch.cuda.utilization())
            except (RuntimeError, ModuleNotFoundError):  # no access to the driver's counters
                return

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    began = time.perf_counter()
    while time.perf_counter() - began < duration:
        step()
        torch.cuda.synchronize()
    stop.set()
    sampler.join()
    late = samples[len(samples) // 3 :]  # the driver averages over the past
    return round(statistics.mean(late), 1) if late else None


# precision in a name -> matrix product that its utilisation is measured against
PRODUCT_OF = {"bf16": "bfloat16", "tf32": "tf32", "fp32": "float32"}


def product_of(name: str, rates: dict[str, float]) -> str:
    """Return the name of the matrix product that a variant is measured against; on a CPU, TF32 is fp32."""
    kind = PRODUCT_OF.get(precision_of(name), "float32")
    return kind if kind in rates else "float32"


def product_rates(device: str) -> dict[str, float]:
    """Return the operations per second of a large matrix product in each precision; TF32 exists on GPUs only."""
    rates = {}
    for word in PRECISIONS if on_gpu(device) else ("fp32", "bf16"):
        allow_tf32(f"full_{word}")
        rates[PRODUCT_OF[word]] = product_flops(device, "bfloat16" if word == "bf16" else "float32")
    return rates


def product_flops(device: str, kind: str) -> float:
    """Return the operations per second of a large matrix product, the best of five."""
    size = 8192 if on_gpu(device) else 2048
    a, b = (torch.rand(size, size, device=device).to(getattr(torch, kind)) for _ in range(2))
    (a @ b).sum()
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def measured_memory(name: str) -> float:
    """Return the peak MB of one variant, measured in its own process."""
    command = [sys.executable, *sys.argv, "--memory", name]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, env=os.environ).stdout))


def peak_mb(args: argparse.Namespace, data: LabelledImages, folder: Path) -> float:
    """Return the peak memory of two steps in MB, above what the process held before the model was built."""
    cuda = on_gpu(args.device)
    before = 0.0 if cuda else peak_process_mb()
    step, _ = step_of(args.memory, args, data, folder)
    step()
    step()
    if cuda:
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(peak_process_mb() - before, 1)


def ratio(one: list[float], other: list[float]) -> dict[str, float]:
    """Median and range of the rounds' ratios."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    middle = statistics.median(ratios)
    return {"median": round(middle, 3), "lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)}


if __name__ == "__main__":
    main()
