#!/usr/bin/env python
"""Train the feature gate of the shipped model on packed images: some minutes on a CPU.

    python -m tools.packed_gate --images images.parquet --out gate0
    python -m tools.packed_gate --images images.parquet --out gate1 --seed 1 --robust TUNED

images.parquet is a file of tools/pack_images.py, of images as they are (--quality 100): a gate that saw compressed
images alone takes the detail of others for an attack. TUNED is a tuned encoder of tools/robust_branch.py; without one
it is the robust encoder of the shipped model. The gate learns from the part "gate", which the branch was not tuned on,
and from mosaics of it, whose detail is as fine as that of large photos. Half of each validation set joins its
calibration, the other half measures false alarms. Four of the universal attacks of reproduction/gate_study.py are left
out, so that it measures unseen kinds. A killed run continues.
"""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tools.pack_images import Packed, mosaics, unpack
from zepad_mm import ZePAD
from zepad_mm.encoders import load_clip
from zepad_mm.training import GateSettings, load_tuned, train_gate, write_gate
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import origin
from zepad_mm.utils.seeding import seeded_generator

PUBLIC = "open_clip:embedded"
CALIBRATION = 200  # validation images of each set
SETTINGS = GateSettings(
    n=4000, universal=("feature_uap", "adv_encoder", "fff", "adv_encoder_patch"), held_out=None, universal_steps=40,
    corrupted_views=1, universal_views=1, per_image_n=500, stopped_n=1200, rounds=2, round_n=150,
    least_change=0.1, gating_rate=0.03,
)  # fmt: skip


def main() -> None:
    """Train, and write gate.safetensors and gate.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--robust", type=Path, help="folder of the tuned encoder (default: that of the shipped model)")
    parser.add_argument("--images", type=Path, required=True, help="file of tools/pack_images.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--public", default=PUBLIC, help="source of the encoder that attackers know")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mosaics", type=int, default=1500)
    parser.add_argument("--limit", type=int, help="use so many images of each set, in short steps: a dry run")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    public, text = load_clip(options.public)
    public, settings = public.eval().to(device), replace(SETTINGS, seed=options.seed)
    if options.robust is None:
        robust = ZePAD.from_pretrained("embedded").branch("fare").encoder
    else:
        robust = load_tuned(options.robust)
    if options.limit:
        settings = replace(settings, universal_steps=2, per_image_steps=1, rounds=1, steps=20)
        settings = replace(settings, per_image_n=8, stopped_n=8, round_n=8)
    side = public.preprocess.image_size
    learned = unpack(options.images, "gate", side)
    sources = _by_source(learned, options.limit)
    count = 4 * options.limit if options.limit else options.mosaics
    sources["mosaics"] = mosaics(learned, count, seeded_generator(options.seed)).float() / 255
    held = _by_source(unpack(options.images, "validation", side), options.limit or CALIBRATION)
    gate, record = train_gate(
        public, [robust.to(device)], sources, settings,
        calibration={f"{name} validation": images for name, images in held.items()},
        directions=text.class_embeddings(learned.class_names), out=options.out, progress=True,
    )  # fmt: skip
    write_gate(options.out / "gate.safetensors", gate.cpu())
    write_json(options.out / "gate.json", {**origin(), **record, "config": gate.config.to_dict()})
    print(f"Written: {options.out}")


def _by_source(packed: Packed, limit: int | None) -> dict[str, Tensor]:
    """(N, 3, S, S) in [0, 1] of each source."""
    return {name: packed.of(name).pixels[:limit].float() / 255 for name in packed.sources}


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
