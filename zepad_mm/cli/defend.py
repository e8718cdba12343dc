"""``zepad defend``."""

from __future__ import annotations

import sys
from typing import Any

from zepad_mm.cli.common import IMAGES, SOURCE, Command, print_result
from zepad_mm.cli.settings_options import SettingsOptions, settings_fields
from zepad_mm.utils.stopping import UNTUNED

DEFEND_SETTINGS = "defend.py:DefendSettings"
DEFEND_OPTIONS = SettingsOptions(
    DEFEND_SETTINGS,
    {
        "--defences": "defences",
        "--eps": "epsilon",
        "--adaptation": "adaptation",
        "--n": "n_train",
        "--n-validation": "n_validation",
    },
)
TRAIN_FIELDS = {"--steps": "steps", "--batch-size": "batch_size", "--seed": "seed"}


def _train_options() -> SettingsOptions:
    return SettingsOptions(
        "training/settings.py:TrainSettings", TRAIN_FIELDS, settings_fields(DEFEND_SETTINGS)["train"].default
    )


def _declare(parser: Any) -> None:
    parser.add_argument("source", type=str, help=f"the public CLIP: {SOURCE}")
    parser.add_argument("--out", type=str, required=True, help="folder of the defended model and its tuned branches")
    parser.add_argument("--robust", nargs="+", type=str, default=[], help="ready robust encoders: nothing is tuned")
    parser.add_argument("--data", type=str, default=None, help=f"training and validation images: {IMAGES}")
    parser.add_argument("--quick", action="store_true", help="few images and steps: minutes, and a weak defence")
    DEFEND_OPTIONS.declare(parser)
    _train_options().declare(parser)


def _run(options: Any) -> int:
    from dataclasses import replace

    from zepad_mm.defend import DefendSettings, defend, quick_settings, untuned_warning

    settings = quick_settings() if options.quick else DefendSettings()
    train = replace(settings.train, **_train_options().given(options))
    settings = replace(settings, train=train, **DEFEND_OPTIONS.given(options))
    model = defend(options.source, robust=options.robust, data=options.data, out=options.out, settings=settings)
    branches = ", ".join(f"{branch.name} ({branch.objective})" for branch in model.config.branches)
    print_result(
        options,
        {"out": options.out, **model.config.to_dict()},
        f"Written: {options.out}; branches {branches}; fusion {model.config.fusion} {model.config.rule_params}\n"
        f"Not evaluated yet. With labelled images: zepad evaluate {options.out} --data labelled/ --preset demo",
    )
    if untuned := untuned_warning(model.config):
        print(f"zepad: {untuned}", file=sys.stderr, flush=True)
    return UNTUNED if untuned else 0


DEFEND = Command(
    about="Defend a public CLIP: with ready robust weights, or by tuning robust branches (resumes after a crash).",
    example="zepad defend open_clip:embedded --data embedded --out defended",
    declare=_declare,
    run=_run,
)
