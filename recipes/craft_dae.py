"""Craft a downstream-agnostic perturbation on any encoder, without a label, and save it with its provenance.

What it is: the attacker's side. One perturbation for all pictures, by any of UNIVERSAL_ATTACKS, made on one encoder
or on several at once, from unlabelled surrogate pictures.

Run first: nothing. Afterwards: zepad evaluate, or your own test with Perturbation.load(path)(images).

Leaves in --out: NAME.safetensors, and NAME.png with the pattern magnified to the full range.

    CPU:       python recipes/craft_dae.py --config recipes/configs/smoke/craft_dae.yaml
    one GPU:   python recipes/craft_dae.py --config recipes/configs/vit_b32/craft_dae.yaml
    8 GPUs, 2 nodes: crafting is one process; start one per attack and encoder.

Every field is an option too (--steps 600); --print_config shows them all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torchvision.utils import save_image

from zepad_mm.attacks import UNIVERSAL_ATTACKS
from zepad_mm.data import load_data
from zepad_mm.encoders import load_encoder
from zepad_mm.utils.config import Config


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """Configuration of recipes/craft_dae.py."""

    out: str  # folder of the result
    sources: tuple[str, ...] = ("open_clip:embedded",)  # encoders it is made on; several: the losses are averaged
    attack: str = "feature_uap"  # a name of zepad_mm.attacks.UNIVERSAL_ATTACKS
    epsilon: float | None = None  # budget in pixels of [0, 1], of a patch its share of the area; None: the attack's
    steps: int | None = None  # optimiser steps; None: the attack's default
    data: str = "embedded"  # the attacker's pictures; labels are not used
    split: str = "surrogate"
    image_size: int = 64  # side of the perturbation; it is resized to pictures of another size
    n: int | None = None  # pictures; None: all
    seed: int = 0


def main(recipe: Recipe) -> Path:
    """Craft and write; returns the path of the perturbation."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attack = UNIVERSAL_ATTACKS.get(recipe.attack)(image_size=recipe.image_size, seed=recipe.seed)
    if recipe.epsilon is not None:
        attack = replace(attack, epsilon=recipe.epsilon)
    if recipe.steps is not None:
        attack = replace(attack, steps=recipe.steps)
    encoders = {source: load_encoder(source).to(device) for source in recipe.sources}
    pictures = load_data(recipe.data, recipe.split, recipe.image_size, recipe.n, recipe.seed).images.to(device)
    perturbation = attack.fit(encoders, pictures, progress=True)
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{recipe.attack}.safetensors"
    perturbation.save(path)
    delta = perturbation.delta
    shown = delta if attack.norm == "patch" else 0.5 + delta / (2 * attack.epsilon)
    save_image(shown, out / f"{recipe.attack}.png")
    print(f"{path}: {dict(perturbation.provenance)}")
    return path


if __name__ == "__main__":
    main(Recipe.from_cli())
