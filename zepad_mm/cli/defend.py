"""``zepad defend``."""

from __future__ import annotations

import sys
from typing import Any

from zepad_mm.cli.common import IMAGES, SOURCE, Command, print_result
from zepad_mm.cli.settings_options import SettingsOptions, settings_fields
from zepad_mm.utils.stopping import NO_EFFECT

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

    from zepad_mm.defend import DefendSettings, defend, quick_settings
    from zepad_mm.models.card import weakness_warning

    settings = quick_settings() if options.quick else DefendSettings()
    train = replace(settings.train, **_train_options().given(options))
    settings = replace(settings, train=train, **DEFEND_OPTIONS.given(options))
    model = defend(options.source, robust=options.robust, data=options.data, out=options.out, settings=settings)
    print_result(options, {"out": options.out, **model.config.to_dict()}, "\n".join(_closing_words(options.out, model)))
    if weakness := weakness_warning(model.config):
        print(f"zepad: {weakness}", file=sys.stderr, flush=True)
    return NO_EFFECT if weakness else 0


def _closing_words(out: str, model: Any) -> list[str]:
    """What was made, and what to do next."""
    from zepad_mm.models.card import describe_effect

    config = model.config
    branches = "; ".join(f"{branch.name}, {branch.role} ({branch.objective})" for branch in config.branches)
    constants = ", ".join(f"{name} {value:g}" for name, value in config.rule_params.items())
    threshold = config.detector.threshold
    flags = "nothing is flagged" if threshold is None else f"flagged above {threshold:.3g}"
    return [
        f"Written: {out}",
        f"  branches (encoders): {branches}",
        f"  fusion rule, which makes one answer of theirs: {config.fusion}{f' ({constants})' if constants else ''}",
        f"  suspicion score, which flags attacked images: {config.detector.score}, {flags}",
        *([] if config.effect is None or config.effect.is_none else [f"  {describe_effect(config.effect)}"]),
        f"Not evaluated yet. With labelled images: zepad evaluate {out} --data labelled/ --preset demo",
    ]


DEFEND = Command(
    about="Defend a public CLIP: with ready robust weights, or by tuning robust branches (resumes after a crash).",
    example="zepad defend open_clip:embedded --data embedded --out defended",
    declare=_declare,
    run=_run,
)
