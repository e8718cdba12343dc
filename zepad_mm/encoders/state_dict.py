"""State dicts: foreign checkpoints read without unpickling, and strict loading."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from zepad_mm.encoders.build_limits import check_memory_of
from zepad_mm.encoders.library_configs import DEEPEST, WRONG_CONFIG
from zepad_mm.utils.io import check_not_inflated, read_tensors

OF_A_LAYER = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
TRAINING = ("callbacks", "loops", "lr_schedulers", "optimizer_states")  # Lightning's own, beside "state_dict"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
SHOWN = 3  # names that an error message lists


def load_state_dict_strict(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str, hint: str, *, optional: tuple[str, ...] = ()
) -> None:
    """Copy ``tensors`` into the state dict ``own``, in place, if both have the same names and shapes.

    Args:
        own: of the module that is filled: ``module.state_dict()``.
        tensors: from a file.
        where: what the tensors are from, as the error begins.
        hint: why they may not fit, as the error ends.
        optional: endings of names that may be missing.

    Raises:
        ValueError: a missing or unknown name, another shape or a type that does not fit, NaN or infinity.
    """
    missing = [name for name in own if name not in tensors and not name.endswith(optional)]
    unknown = [name for name in tensors if name not in own]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    wrong += [
        f"{name} as {tensors[name].dtype} instead of {tensor.dtype}"
        for name, tensor in own.items()
        if name in tensors and not _fits_type(tensors[name].dtype, tensor.dtype)
    ]
    for problem, names in (("lacks", missing), ("has the unknown", unknown), ("has", wrong)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise ValueError(f"{where} {problem} {', '.join(sorted(names)[:SHOWN])}{more}; {hint}")
    endless = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if endless:
        raise ValueError(f"{where} has NaN or infinity in {', '.join(sorted(endless)[:SHOWN])}; it is damaged")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _fits_type(found: torch.dtype, own: torch.dtype) -> bool:
    """Whether a tensor of one type may be copied into one of another: floats of 16 bits or more, or whole numbers."""
    if own.is_floating_point:
        return found in FLOATS
    return found == own or (own != torch.bool and found in INTEGERS)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def check_weights(module: nn.Module, where: str) -> None:
    """Raise ValueError that names the first weights with NaN or infinity; buffers such as masks may hold infinity."""
    for name, parameter in module.named_parameters():
        if not is_finite(parameter.detach()):
            raise ValueError(f"{where} has NaN or infinity in {name}; its weights are damaged")


def read_foreign(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a ``.pt``, ``.pth``, ``.ckpt``, ``.tar`` or ``.safetensors`` file, nested names joined by dots.

    ``{"state_dict": {"backbone.conv1.weight": ...}}`` gives ``state_dict.backbone.conv1.weight``. Optimiser states,
    numbers and texts are not weights and are skipped.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged, or needs Python objects that are never unpickled here.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint (.pt, .pth, .ckpt, .tar, .safetensors)")
    if path.suffix == ".safetensors":
        return check_memory_of(read_tensors(path)[0], path)
    check_not_inflated(path)
    try:
        # a Namespace is a bag of settings without code; MoCo, DINO and SupCon store theirs beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
        raise ValueError(
            f"{path} holds more than tensors, and unpickling it could run any code: {reason.strip()[:200]}. Where you "
            "trust it, unpickle it in a program of your own and write its state dict with safetensors.torch.save_file"
        ) from error
    except (RuntimeError, EOFError, ValueError, *WRONG_CONFIG) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or no checkpoint of torch: {first_line}") from error
    tensors = _flat(content)
    if not tensors:
        raise ValueError(f"{path} holds no named tensors; expected a state dict, got {type(content).__name__}")
    return check_memory_of(tensors, path)


def _flat(content: Any, depth: int = 0) -> dict[str, Tensor]:
    if not isinstance(content, dict) or depth > DEEPEST:
        return {}
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or name in TRAINING:  # elsewhere an optimiser's state is numbered
            continue
        if isinstance(value, Tensor):
            found[name] = value
        else:
            found |= {f"{name}.{key}": tensor for key, tensor in _flat(value, depth + 1).items()}
    return found


def summary(names: Iterable[str], prefixes: Iterable[str] = ()) -> str:
    """Names of tensors in one line with how many there are, layers of one stack together.

    Args:
        names: all of them are counted somewhere.
        prefixes: what begins with one of these is counted under it.
    """
    groups: Counter[str] = Counter()
    for name in names:
        known = next((prefix for prefix in prefixes if prefix and name.startswith(prefix)), "")
        parts = name.split(".")
        stack = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        stack += parts[-1] not in OF_A_LAYER and stack == len(parts) - 1  # a queue or a token is named itself
        groups[known.rstrip(".") or ".".join(parts[: max(1, stack)])] += 1
    return ", ".join(f"{name} ({count})" for name, count in sorted(groups.items())) or "nothing"
