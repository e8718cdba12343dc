"""Craft a universal perturbation on one or several encoders, without labels: ``zepad attack`` as a recipe.

Run first: nothing. Afterwards: zepad evaluate, or your own test with Perturbation.load(path)(images).

Leaves in --out: ATTACK.safetensors, and ATTACK.png with the perturbation magnified to the full range.

    CPU:       python recipes/attack.py --config recipes/configs/smoke/attack.yaml
    one GPU:   python recipes/attack.py --config recipes/configs/vit_b32/attack_adv_encoder.yaml
    8 GPUs, 2 nodes: crafting is one process; start one per attack and encoder.

Every field is an option too (--steps 600); --print_config shows them all.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from zepad_mm.cli.attack import AttackSettings as Recipe
from zepad_mm.cli.attack import craft
from zepad_mm.utils.stopping import run_program


def main(recipe: Recipe) -> Path:
    """Craft and save; returns the path of the perturbation."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    perturbation = craft(recipe)
    print(f"{recipe.path}: {dict(perturbation.provenance)}")
    return recipe.path


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(Recipe.from_cli())))
