#!/usr/bin/env python
"""Speed of the classifier, compared with plain encoder forwards and with the pipeline of transformers.

    python -m benchmarks.classifier              # results/classifier_speed.json
    python -m benchmarks.classifier --small      # seconds, to check that it runs

A CLIP ViT-B/32 of transformers, of random weights (no weights are needed to measure time), defended twice: by two
branches of other weights beside itself, and by two LoRA branches over one frozen trunk, with adapters on the upper half
or third of its blocks, so that the blocks below run once. A batch of images of 224 pixels, one template, classified
repeatedly:

- three naive encoders: the three image towers one after the other on tensors that are ready, no text, no fusion;
- the pipeline: zero-shot-image-classification on one CLIP, which encodes the labels anew for every call;
- the classifier: from tensors and from PIL images, with and without evidence, with three branches and with one, with
  ten labels and with a hundred.

Every variant is timed in turn, round after round in one process, so that a busy machine slows all of them alike; the
ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torchvision.transforms.functional import to_pil_image

from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.defend import defend
from zepad_mm.encoders import LoraSettings, add_lora, load_clip
from zepad_mm.encoders.shared_trunk import blocks_of
from zepad_mm.models.branch import Branch, BranchConfig, Role
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
LABELS = ["dress", "hat", "jacket", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt", "coat"]
MANY = [f"{label} of kind {number}" for number in range(10) for label in LABELS]
TEMPLATE = "this is a photo of {}."


def write_clip(folder: Path, small: bool, seed: int) -> str:
    """A CLIP of transformers with random weights and a tokenizer of letters; its source."""
    torch.manual_seed(seed)
    config: Any = transformers.CLIPConfig()  # ViT-B/32
    if small:
        narrow = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.CLIPConfig(vision_config=narrow, text_config=narrow)
    words = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz.,-Ġ" for end in ("", "</w>")]
    names = ["<|startoftext|>", "<|endoftext|>", *words]
    config.text_config.bos_token_id, config.text_config.eos_token_id = 0, 1
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor().save_pretrained(folder)
    vocabulary = {name: index for index, name in enumerate(names)}
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(folder)
    return f"hf:local-dir:{folder}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="narrow towers, two rounds, a batch of 4")
    parser.add_argument("--device", type=str, default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "classifier_speed.json")
    args = parser.parse_args()
    batch, rounds = (4, 2) if args.small else (args.batch, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for seed in range(3):
            (Path(folder) / str(seed)).mkdir()
            sources.append(write_clip(Path(folder) / str(seed), args.small, seed))
        classify = RobustZeroShotClassifier(defend(sources[0], robust=sources[1:]), batch_size=batch).to(args.device)
        theirs = transformers.pipeline(
            "zero-shot-image-classification", model=f"{folder}/0", device=args.device, batch_size=batch
        )
        lora = {
            part: RobustZeroShotClassifier(over_one_trunk(sources[0], part), batch_size=batch).to(args.device)
            for part in (2, 3)
        }
        calls = timed_calls(classify, lora, theirs, batch)
        weights = {name: weight_bytes(one) for name, one in [("apart", classify.model), ("lora", lora[2].model)]}
        alone = weight_bytes(classify.model.branch("benign").encoder)
        times = measure(calls, rounds, args.device)
    ratios = {
        "time of the classifier / three naive encoder forwards (tensors)": ratio(times, "tensors", "three_naive"),
        "time of the classifier / one undefended encoder forward (tensors)": ratio(times, "tensors", "one_naive"),
        "time of the classifier, LoRA on the upper half of one trunk / one undefended encoder forward": ratio(
            times, "lora_half", "one_naive"
        ),
        "time of the classifier, LoRA on the upper third of one trunk / one undefended encoder forward": ratio(
            times, "lora_third", "one_naive"
        ),
        "time with evidence / without": ratio(times, "tensors_evidence", "tensors"),
        "time of the pipeline / the classifier, three branches": ratio(times, "pipeline", "pil"),
        "time of the pipeline / the classifier, LoRA on the upper third": ratio(times, "pipeline", "lora_pil"),
        "time of the pipeline / the classifier, one branch": ratio(times, "pipeline", "pil_one_branch"),
        "time of the pipeline / the classifier, three branches, 100 labels": ratio(times, "pipeline_100", "pil_100"),
        "time of the pipeline / the classifier, one branch, 100 labels": ratio(
            times, "pipeline_100", "pil_one_branch_100"
        ),
    }
    record = {
        "meta": provenance(seed=0, config={"batch": batch, "rounds": rounds, "small": args.small, "labels": LABELS}),
        "model": "CLIP ViT-B/32, random weights" if not args.small else "a narrow CLIP, random weights",
        "images_per_second": {name: round(batch / statistics.median(seconds), 2) for name, seconds in times.items()},
        "ratios": ratios,
        "weights": {
            "three branches / one undefended encoder": round(weights["apart"] / alone, 3),
            "LoRA branches over one trunk / one undefended encoder": round(weights["lora"] / alone, 3),
        },
        "seconds": {name: [round(second, 4) for second in seconds] for name, seconds in times.items()},
    }
    write_json(args.out, record)
    for name, value in ratios.items():
        print(f"{name}: {value}")


def over_one_trunk(source: str, part: int) -> ZePAD:
    """The public encoder and two LoRA branches of rank 8 on the last ``1 / part`` of its blocks, no weight twice."""
    encoder, text = load_clip(source)
    blocks = len(blocks_of(encoder.backbone))
    roles: dict[str, Role] = {"one": "robust", "two": "robust", "benign": "benign"}
    branches = []
    for name, role in roles.items():
        adapted = copy.deepcopy(encoder)
        if role == "robust":
            add_lora(adapted, LoraSettings(rank=8, first_block=blocks - max(1, blocks // part)))
        config = BranchConfig(name=name, role=role, source=source, adaptation="lora" if role == "robust" else "none")
        branches.append(Branch(config, adapted.eval(), zero_shot_head(text, ["a", "b"], [TEMPLATE])))
    configs = tuple(branch.config for branch in branches)
    model = ZePAD(ZePADConfig(public_source=source, branches=configs, class_names=("a", "b")), branches).eval()
    model.share_trunk()
    return model


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters of image encoders, each storage once."""
    encoders: list[Any] = (
        [module.branch(name).encoder for name in module.branches] if isinstance(module, ZePAD) else [module]
    )
    held = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for each in encoders for p in each.parameters()
    }
    return sum(held.values())


def timed_calls(
    classify: RobustZeroShotClassifier, lora: dict[int, RobustZeroShotClassifier], theirs: Any, batch: int
) -> dict[str, Callable[[], Any]]:
    """Return the timed calls by name; all classify the same images among the same labels."""
    model = classify.model
    pixels = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(model.device)
    pil_images = [to_pil_image(image.cpu()) for image in pixels]
    encoders = [model.branch(name).encoder for name in model.branches]
    alone = RobustZeroShotClassifier(_one_branch(model), classify.batch_size)

    @torch.no_grad()
    def encode(count: int) -> list[torch.Tensor]:
        return [encoder(pixels) for encoder in encoders[-count:]]

    def ours(one: RobustZeroShotClassifier, images: Any, labels: list[str], **options: Any) -> Callable[[], Any]:
        return lambda: one(images, labels, hypothesis_template=TEMPLATE, **options)

    return {
        "one_naive": lambda: encode(1),
        "three_naive": lambda: encode(3),
        "tensors": ours(classify, pixels, LABELS),
        "tensors_evidence": ours(classify, pixels, LABELS, return_evidence=True),
        "lora_half": ours(lora[2], pixels, LABELS),
        "lora_third": ours(lora[3], pixels, LABELS),
        "pil": ours(classify, pil_images, LABELS),
        "lora_pil": ours(lora[3], pil_images, LABELS),
        "pil_one_branch": ours(alone, pil_images, LABELS),
        "pipeline": lambda: theirs(pil_images, candidate_labels=LABELS, hypothesis_template=TEMPLATE),
        "pil_100": ours(classify, pil_images, MANY),
        "pil_one_branch_100": ours(alone, pil_images, MANY),
        "pipeline_100": lambda: theirs(pil_images, candidate_labels=MANY, hypothesis_template=TEMPLATE),
    }


def _one_branch(model: Any) -> Any:
    """The public encoder alone, as the pipeline has it."""
    benign = model.branch("benign")
    single = ZePAD(replace(model.config, branches=(benign.config,)), [benign])
    single._lazy = model._lazy  # the text tower, once
    return single


def measure(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each, round after round; a first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, run in calls.items():
            began = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Median and range over the rounds."""
    ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
    }


if __name__ == "__main__":
    main()
