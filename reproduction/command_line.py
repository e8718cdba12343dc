"""Settings from a YAML file and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from zepad_mm.utils.config import Config

C = TypeVar("C", bound=Config)


def parse(settings: type[C], description: str | None, arguments: Sequence[str] | None = None) -> C:
    """Return ``settings`` from ``--config FILE.yaml`` and an option for every field; unknown keys are errors."""
    parser = ArgumentParser(description=description, formatter_class=DefaultHelpFormatter)
    parser.add_argument("--config", action="config", help="YAML file with the settings below")
    parser.add_class_arguments(settings)
    values = parser.parse_args(arguments).as_dict()
    values.pop("config")
    return settings.from_dict(values)
