#!/usr/bin/env python
"""Pre-train the zoo: one small encoder for each of the paper's eleven SSL methods, all on the same public images.

    python -m reproduction.build_ssl_zoo --data uoft-cs/cifar10             # two to three hours on one CPU thread
    python -m reproduction.build_ssl_zoo --methods simclr byol --epochs 4   # part of it
    python -m reproduction.build_ssl_zoo --half reproduction/ssl_zoo        # and copies in half precision

Each is one run of ``recipes/pretrain.py`` with ``reproduction/configs/ssl_zoo.yaml`` and the method's own constants
below; finished methods are kept, and a killed run resumes from its last complete epoch. Writes
``OUT/METHOD/encoder`` (for ``load_encoder("timm:local-dir:OUT/METHOD/encoder")``), and the table
``results/ssl_zoo.json`` and ``.md`` with the accuracy of a kNN and of a linear probe for each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recipes import pretrain
from zepad_mm.utils.io import read_json, read_tensors, write_json, write_tensors, write_text
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]

# the paper's methods, and where the shared constants of the config do not fit one
METHODS: dict[str, list[str]] = {
    "w_mse": ["--projection_dim", "32"],  # whitened over a batch of 128
    "byol": [],
    "nnclr": [],
    "simclr": [],
    "moco_v2_plus": [],
    "moco_v3": [],
    "supcon": ["--temperature", "0.1"],
    "ressl": [],
    "dino": [],
    "swav": ["--prototypes", "128"],  # about one per image of a batch, or most stay empty
    "vibcreg": [],
}
PAPER_LINEAR = {
    "byol": 92.58, "dino": 89.52, "moco_v2_plus": 92.94, "moco_v3": 93.10, "nnclr": 91.88, "ressl": 90.63,
    "simclr": 90.74, "supcon": 93.82, "swav": 89.17, "vibcreg": 91.18, "w_mse": 88.67,
}  # fmt: skip  # solo-learn's README: ResNet-18, 1000 epochs


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "reproduction" / "configs" / "ssl_zoo.yaml")
    parser.add_argument("--data", help="Hub name or folder; default: that of the config")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--epochs", type=int, help="overrides the config's")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ssl_zoo")
    parser.add_argument("--result", type=Path, default=ROOT / "results" / "ssl_zoo", help="without suffix")
    parser.add_argument("--half", type=Path, help="folder for copies of all encoders in half precision, 2.4 MiB each")
    args = parser.parse_args(arguments)
    given = ["--data", args.data] if args.data else []
    given += ["--epochs", str(args.epochs)] if args.epochs else []
    for seed, method in enumerate(METHODS, 11):  # a method's seed does not depend on which others are asked for
        folder = args.out / method
        if method in args.methods and not (folder / "pretrain.json").is_file():
            run = ["--config", str(args.config), "--method", method, "--seed", str(seed), "--out", str(folder)]
            pretrain.main([*run, *METHODS[method], *given])
    done = {name: args.out / name / "pretrain.json" for name in METHODS}
    rows = {name: read_json(path) for name, path in done.items() if path.is_file()}
    if args.half:
        for name in rows:
            write_half(args.out / name, args.half / name)
    record = {"meta": provenance(seed=11, config={"methods": list(rows)}), "rows": rows, "published": PAPER_LINEAR}
    write_json(args.result.with_suffix(".json"), record)
    write_text(args.result.with_suffix(".md"), markdown(rows))
    print(markdown(rows))
    return record


def write_half(source: Path, target: Path) -> None:
    """A copy of one encoder whose floating-point weights are in half precision; ``load_encoder`` reads both."""
    tensors, about = read_tensors(source / "encoder" / "model.safetensors")
    small = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    write_tensors(target / "encoder" / "model.safetensors", small, about)
    for name in ("encoder/config.json", "pretrain.json"):
        write_json(target / name, read_json(source / name))


def markdown(rows: dict[str, Any]) -> str:
    """One line for each method."""
    one = next(iter(rows.values()))
    config = one["config"]
    start = f"from {config['initial']}, " if config.get("initial") else ""
    images = " and ".join([config["data"], *config.get("more_data", [])])
    lines = [
        "# The zoo of SSL encoders\n",
        f"{one['parameters'] / 1e6:.2f} M parameters, {start}{config['image_size']} px, {config['epochs']} epochs of "
        f"{one['n_train']} images of {images} ({config['part']}), {one['hardware']}; accuracy in % on "
        f"{one['n_held_out']} held-out images of the same half of {config['data']}. Written by "
        "`reproduction/build_ssl_zoo.py`. The last column is solo-learn's ResNet-18 after 1000 epochs of all 50,000, "
        "on the test images.\n",
        "| method | kNN | linear probe | seconds of the last start, on shared cores | published linear |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        found = f"{100 * row['knn_accuracy']:.1f} | {100 * row['linear_accuracy']:.1f} | {row['wall_s']:.0f}"
        lines.append(f"| {name} | {found} | {PAPER_LINEAR[name]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
