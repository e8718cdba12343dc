"""``zepad attack``."""

from __future__ import annotations

from typing import Any

from zepad_mm.cli.common import DATA, SOURCE, Command, budget, print_result


def _declare(parser: Any) -> None:
    parser.add_argument("encoder", type=str, help=SOURCE)
    parser.add_argument("--attack", type=str, default="feature_uap", help="its name; an unknown one lists all")
    parser.add_argument("--data", type=str, default="embedded", help=DATA)
    parser.add_argument("--split", type=str, default=None, help='default "surrogate" for embedded, else "train"')
    parser.add_argument("--eps", type=str, default=None, help="budget; of a patch the area (default: the attack's)")
    parser.add_argument("--n", type=int, default=1000, help="pictures to make it on")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (default: the attack's)")
    parser.add_argument("--image-size", type=int, default=64, help="side of the perturbation in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--out", type=str, default="outputs/perturbation.safetensors", help="file to write")


def _run(options: Any) -> int:
    from dataclasses import replace

    from zepad_mm.attacks import UNIVERSAL_ATTACKS
    from zepad_mm.data import load_data
    from zepad_mm.encoders import load_encoder

    made = UNIVERSAL_ATTACKS.get(options.attack)(image_size=options.image_size, seed=options.seed)
    made = made if options.eps is None else replace(made, epsilon=budget(options.eps))
    made = made if options.steps is None else replace(made, steps=options.steps)
    encoder = load_encoder(options.encoder)
    split = options.split or ("surrogate" if options.data == "embedded" else "train")
    pictures = load_data(options.data, split, options.image_size, options.n, options.seed)
    perturbation = made.fit(encoder, pictures.images, progress=not options.quiet)
    perturbation.save(options.out)
    about = {"out": options.out, "epsilon": perturbation.epsilon, **perturbation.provenance}
    print_result(options, about, f"Written: {options.out} ({perturbation!r})")
    return 0


ATTACK = Command(
    about="Make a universal perturbation on an encoder, for tests of your own.",
    example="zepad attack open_clip:embedded --attack feature_uap --eps 10/255 --out perturbation.safetensors",
    declare=_declare,
    run=_run,
)
