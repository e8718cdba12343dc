"""Loading a model leaves the process as it was."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch


@contextmanager
def preserved_environment() -> Iterator[None]:
    """Context after which the environment variables are as before."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


def import_isolated(name: str) -> Any:
    """A module of a library whose import sets environment variables, imported without them.

    torchvision imports torch's compiler, which sets the folder of its cache.
    """
    with preserved_environment():
        return import_module(name)


@contextmanager
def preserved_process_state(random_state: bool = True) -> Iterator[None]:
    """Context after which torch's random state, the environment and the handlers of the root logger are as before.

    Libraries initialise weights that are then overwritten, set variables at import, and log on the root logger, which
    installs a handler. Tensors made inside are normal ones, float32 on the CPU, whatever the caller's inference mode,
    autocast, default type and default device: models are kept, and may need gradients later.

    Args:
        random_state: False lets the block draw from torch's random state, for weights that stay random.
    """
    root = logging.getLogger()
    handlers, state = list(root.handlers), torch.get_rng_state()
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    elsewhere = torch.get_default_device().type != "cpu"
    try:
        torch.set_default_dtype(torch.float32)
        with (
            preserved_environment(),
            torch.device("cpu") if elsewhere else nullcontext(),
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        if random_state:
            torch.set_rng_state(state)
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)


@contextmanager
def library_logs(library: str) -> Iterator[None]:
    """Context in which a library that logs on the root logger logs under its own name, warnings and worse alone.

    Args:
        library: name of its package, which is imported already.
    """
    log = logging.getLogger(f"zepad_mm.{library}")
    log.setLevel(logging.WARNING)
    prefix = library + "."
    modules = [
        module
        for name, module in list(sys.modules.items())
        if (name == library or name.startswith(prefix)) and getattr(module, "logging", None) is logging
    ]
    for module in modules:
        module.logging = log  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.logging = logging  # type: ignore[attr-defined]
