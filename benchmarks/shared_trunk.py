"""What a shared trunk saves: weights held and time taken, beside one encoder and beside three separate ones.

A ViT-B/32 of open_clip's own config with random weights (speed does not depend on them), two LoRA branches and the
untouched base, adapters from the first block on, from the middle, and from the last third. Variants take turns, so that
a busy machine slows all of them alike; the median round counts. Writes ``results/shared_trunk.json`` and
``.md``. Three to ten minutes on one CPU core.

    python -m benchmarks.shared_trunk [--arch ViT-B-32] [--batch 64] [--rounds 7] [--device cuda [--precision bf16]]
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from zepad_mm.encoders import Encoder, LoraSettings, SharedTrunk, add_lora, load_encoder
from zepad_mm.encoders.attention import unfuse_attention
from zepad_mm.encoders.shared_trunk import blocks_of
from zepad_mm.utils.io import write_json, write_text
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
Run = Callable[[Tensor], list[Tensor]]


def weight_bytes(encoders: list[Encoder]) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    stores = {}
    for module in nn.ModuleList(encoders).modules():
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None:
                stores[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(stores.values())


def three(base: Encoder, first_block: int, rank: int) -> list[Encoder]:
    settings = LoraSettings(rank=rank, first_block=first_block)
    return [*(add_lora(copy.deepcopy(base), settings).eval() for _ in range(2)), copy.deepcopy(base)]


def run_each(encoders: list[Encoder], images: Tensor) -> list[Tensor]:
    """Return the features of each encoder."""
    return [encoder(images) for encoder in encoders]


def seconds(run: Run, images: Tensor, backward: bool) -> float:
    """One forward pass, and where asked for the gradient to the input, as an attack's step takes it."""
    synchronise = torch.cuda.synchronize if images.is_cuda else lambda: None
    clock = (
        time.perf_counter if images.is_cuda else time.process_time
    )  # other jobs disturb CPU time less than wall time
    synchronise()
    started = clock()
    if backward:
        x = images.clone().requires_grad_(True)
        torch.autograd.grad(torch.stack([features.square().sum() for features in run(x)]).sum(), x)
    else:
        with torch.no_grad():
            run(images)
    synchronise()
    return clock() - started


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="ViT-B-32", help="a model name of open_clip")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="bf16: by autocast")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the two files")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    base = load_encoder(f"open_clip:{options.arch}", pretrained=False).requires_grad_(False).to(options.device)
    depth, size = len(blocks_of(base.backbone)), base.preprocess.image_size
    images = torch.rand(options.batch, 3, size, size, device=options.device)

    variants: dict[str, tuple[list[Encoder], Run]] = {}
    unfused = copy.deepcopy(base)
    unfuse_attention(unfused.backbone)
    variants["one undefended encoder"] = ([base], lambda x: [base(x)])
    variants["the same, attention as adapters need it"] = ([unfused], lambda x: [unfused(x)])
    for first in (0, depth // 2, depth * 2 // 3, depth - 1):
        apart, tied = three(base, first, options.rank), three(base, first, options.rank)
        trunk = SharedTrunk(tied)
        if trunk.shared_blocks != first:
            raise RuntimeError(f"{trunk.shared_blocks} blocks are shared, {first} were to be")
        if not first:
            variants["three separate encoders"] = (apart, partial(run_each, apart))
        variants[f"shared trunk, adapters from block {first} of {depth}"] = (tied, trunk)
        with torch.no_grad():
            few = images[:2]
            for ours, theirs in zip(trunk(few), [each(few) for each in apart], strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        if first:
            del apart

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision != "fp32"
    times: dict[tuple[str, bool], list[float]] = {(name, back): [] for name in variants for back in (False, True)}
    for turn in range(options.rounds + 1):
        for (name, backward), taken in times.items():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                elapsed = seconds(variants[name][1], images, backward)
            if turn:  # the first round warms up
                taken.append(elapsed)
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    alone = weight_bytes([base])
    rows = [
        {
            "variant": name,
            "weights_mb": round(weight_bytes(encoders) / 1e6, 1),
            "weights_ratio": round(weight_bytes(encoders) / alone, 3),
            "forward_s": round(medians[name, False], 4),
            "forward_ratio": round(medians[name, False] / medians["one undefended encoder", False], 2),
            "gradient_s": round(medians[name, True], 4),
            "gradient_ratio": round(medians[name, True] / medians["one undefended encoder", True], 2),
            "forward_all_s": [round(value, 4) for value in times[name, False]],
            "gradient_all_s": [round(value, 4) for value in times[name, True]],
        }
        for name, (encoders, _) in variants.items()
    ]
    config = {key: value for key, value in vars(options).items() if key != "out"}
    about = {**provenance(seed=0, config=config), "torch_threads": torch.get_num_threads()}
    write_json(options.out / "shared_trunk.json", {"meta": about, "rows": rows})
    lines = "\n".join(
        f"| {r['variant']} | {r['weights_mb']} MB, {r['weights_ratio']}x | {r['forward_s']} s, {r['forward_ratio']}x "
        f"| {r['gradient_s']} s, {r['gradient_ratio']}x |"
        for r in rows
    )
    unit = "CPU seconds" if options.device == "cpu" else "seconds"
    text = (
        f"# A shared trunk beside separate encoders\n\nopen_clip's {options.arch}, batch {options.batch}, two LoRA "
        f"branches of rank {options.rank} and the base, {options.device}, {options.precision}, "
        f"{torch.get_num_threads()} torch thread(s); "
        f"{unit}, median of {options.rounds} rounds in turns; ratios are to one undefended encoder. Written by "
        "`benchmarks/shared_trunk.py`.\n\n| | weights | forward | forward and gradient to the input |\n"
        f"|---|---|---|---|\n{lines}\n\n"
        "Adapters on every block leave nothing to run once, but the weights are held once. "
        "The attention of torch that the undefended encoder uses is slow where gradients are wanted: the second row.\n"
        "What late adapters cost in robustness is not measured here.\n"
    )
    write_text(options.out / "shared_trunk.md", text)
    print(text)
    return rows


if __name__ == "__main__":
    main()
