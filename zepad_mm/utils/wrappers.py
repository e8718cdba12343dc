"""Modules without the wrappers of ``torch.compile``, parallel training and weight averaging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside all wrappers around it; itself where there is none."""
    while True:
        children = module._modules
        inner = children.get("_orig_mod") if list(children) == ["_orig_mod"] else None  # of torch.compile
        if isinstance(module, WRAPPERS):
            inner = module.module
        if inner is None:
            return module
        module = inner


@contextmanager
def unwrapped(*modules: nn.Module) -> Iterator[None]:
    """Within, no module inside ``modules`` is wrapped, so that tensors have the names that a fresh model gives them.

    Raises ValueError for parametrized layers, as ``weight_norm`` makes them: no fresh model has their tensors.
    """
    for module in modules:
        for name, layer in module.named_modules():
            if is_parametrized(layer):
                raise ValueError(
                    f"{name} is parametrized, and could not be loaded again; write torch.nn.utils.parametrize."
                    "remove_parametrizations(layer, name) for its tensors first"
                )
    replaced = []
    try:
        for module in modules:
            for parent in list(module.modules()):
                for name, child in list(parent._modules.items()):
                    if child is not None and (inner := unwrap(child)) is not child:
                        replaced.append((parent, name, child))
                        parent._modules[name] = inner
        yield
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child
