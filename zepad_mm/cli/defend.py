"""``zepad defend``."""

from __future__ import annotations

from typing import Any

from zepad_mm.cli.common import DATA, SOURCE, Command, budget, listed, told


def _declare(parser: Any) -> None:
    parser.add_argument("source", type=str, help=f"the public CLIP: {SOURCE}")
    parser.add_argument("--out", type=str, required=True, help="folder of the defended model, and of its parts")
    parser.add_argument("--robust", nargs="+", type=str, default=[], help="ready robust encoders: nothing is tuned")
    parser.add_argument("--data", type=str, default=None, help=f"to tune and choose on: {DATA} (default: embedded)")
    parser.add_argument("--defences", type=str, default=None, help="a robust branch by each (default: tecoa,gen_af)")
    parser.add_argument("--eps", type=str, default=None, help="L-inf budget it is tuned for (default: 4/255)")
    parser.add_argument("--adaptation", type=str, default="lora", help="lora, or full: all weights")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps of each branch (default: 700)")
    parser.add_argument("--batch-size", type=int, default=None, help="images per step (default: 64)")
    parser.add_argument("--n", type=int, default=None, help="training pictures (default: all)")
    parser.add_argument("--n-validation", type=int, default=512, help="pictures that weights and rule are chosen on")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")


def _run(options: Any) -> int:
    from dataclasses import replace

    from zepad_mm.defend import DefendSettings, defend

    settings = DefendSettings(adaptation=options.adaptation, n_train=options.n, n_validation=options.n_validation)
    train = replace(settings.train, seed=options.seed)
    train = train if options.steps is None else replace(train, steps=options.steps)
    train = train if options.batch_size is None else replace(train, batch_size=options.batch_size)
    settings = replace(settings, train=train)
    settings = settings if options.defences is None else replace(settings, defences=tuple(listed(options.defences)))
    settings = settings if options.eps is None else replace(settings, epsilon=budget(options.eps))
    model = defend(options.source, robust=options.robust, data=options.data, out=options.out, settings=settings)
    about = {"out": options.out, **model.config.to_dict()}
    branches = ", ".join(f"{branch.name} ({branch.objective})" for branch in model.config.branches)
    told(
        options,
        about,
        f"Written: {options.out}; branches {branches}; fusion {model.config.fusion} {model.config.fusion_params}\n"
        f"How robust it is, nobody knows yet: zepad evaluate {options.out}",
    )
    return 0


DEFEND = Command(
    about="Put a defence around a public CLIP: with ready robust weights, or tuned here (resumed where it was killed).",
    example="zepad defend open_clip:embedded --data embedded --out defended",
    declare=_declare,
    run=_run,
)
