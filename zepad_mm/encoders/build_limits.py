"""Limits on what building a network may take: a small file must not ask for unbounded memory or time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zepad_mm.utils.io import check_not_inflated

SPARE_TENSORS = 20_000  # made beside those of the file: masks, tables of positions, schedules, pieces of an initialiser
SPARE_ELEMENTS = 2**27  # likewise
FACTOR = 4  # initialisers make temporary tensors of the size of a weight, and converters make copies
MOST_MULTIPLICATIONS = 2**42  # of one image; the largest public ViTs take about 10**12
SPARE_MULTIPLICATIONS, PER_WEIGHT = 2**36, 2**17  # a ViT-B/8 at 1024 pixels takes 75,000 for each weight
WITHOUT_WEIGHTS = (2**14, 2**31)  # tensors and elements of a network that is built without a file


class BuildLimit(TorchDispatchMode):
    """Context in which a network is built; ends in ValueError before more tensors are made than the weights explain.

    Args:
        source: for the message.
        weights: the files of its weights; empty: it is built without, up to ``WITHOUT_WEIGHTS``.
    """

    def __init__(self, source: str, weights: Sequence[Path] = ()) -> None:
        super().__init__()
        self.source = source
        self.tensors, self.elements = tensors, elements = weights_size(weights) if weights else WITHOUT_WEIGHTS
        self._tensors, self._elements = FACTOR * tensors + SPARE_TENSORS, FACTOR * elements + SPARE_ELEMENTS

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _elements_made(function, args)
        if made:
            self._tensors -= 1
            self._elements -= made
            if self._tensors < 0 or self._elements < 0:
                raise ValueError(
                    f"{self.source}: its configuration asks for a far larger network than the {self.tensors:,} tensors "
                    f"of {self.elements:,} numbers in all that are expected; it is damaged, or of other weights"
                )
        return function(*args, **(kwargs or {}))


class ForwardLimit(TorchDispatchMode):
    """Context of the first forward pass of a network; ends in ValueError before one that would take hours.

    A file of a few kilobytes may ask for patches of one pixel in a large image, whose attention grows with the fourth
    power of the side. Multiplications are counted before each product, and after each convolution; a network may take
    some for each of its weights.
    """

    def __init__(self, network: nn.Module, what: str) -> None:
        super().__init__()
        weights = sum(parameter.numel() for parameter in network.parameters())
        self.what, self.most = what, min(MOST_MULTIPLICATIONS, SPARE_MULTIPLICATIONS + PER_WEIGHT * weights)
        self.left = self.most

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = function.overloadpacket.__name__, [arg for arg in args if isinstance(arg, torch.Tensor)]
        self._spend(_multiplications(name, tensors))
        result = function(*args, **(kwargs or {}))
        if "convolution" in name and len(tensors) > 1:
            self._spend(result.numel() * tensors[1].numel() // max(1, tensors[1].shape[0]))
        return result

    def _spend(self, multiplications: int) -> None:
        self.left -= multiplications
        if self.left < 0:
            raise ValueError(
                f"{self.what}: one image takes more than {self.most:.2g} multiplications; its patches are too small "
                "for its images, or its configuration is damaged"
            )


def _multiplications(name: str, tensors: list[torch.Tensor]) -> int:
    """Of a product of matrices or an attention, known before it is computed; 0 for all other functions."""
    if "attention" in name and len(tensors) > 1:
        return 2 * tensors[0].numel() * tensors[1].shape[-2]
    if name in ("mm", "bmm") and len(tensors) > 1:
        return tensors[0].numel() * tensors[1].shape[-1]
    if name in ("addmm", "baddbmm") and len(tensors) > 2:
        return tensors[1].numel() * tensors[2].shape[-1]
    return 0


def _elements_made(function: Any, args: Any) -> int:
    """The elements of the tensor that a factory function makes; 0 for all other functions."""
    name = function.overloadpacket.__name__
    if name in ("empty", "zeros", "ones", "full", "rand", "randn", "empty_strided", "randint", "randperm", "eye"):
        sizes = next((arg for arg in args if isinstance(arg, list | tuple)), args[:1])
        return max(1, math.prod(int(size) for size in sizes)) ** (2 if name == "eye" else 1)
    if name == "repeat":
        return max(1, args[0].numel() * math.prod(args[1]))
    if name in ("empty_like", "zeros_like", "ones_like", "full_like", "clone", "_to_copy", "rand_like", "randn_like"):
        return max(1, args[0].numel())
    if name in ("arange", "linspace", "logspace"):
        numbers = [arg for arg in args if isinstance(arg, int | float)]
        count = numbers[2] if name != "arange" and len(numbers) > 2 else _steps(numbers)
        return max(1, min(int(count), 2**62)) if math.isfinite(count) else 2**62
    return 0


def _steps(numbers: list[Any]) -> float:
    start, end = (0, numbers[0]) if len(numbers) == 1 else numbers[:2]
    return abs(end - start) / abs(numbers[2] if len(numbers) > 2 and numbers[2] else 1)


def weights_size(files: Iterable[Path]) -> tuple[int, int]:
    """Tensors and elements in files of weights: from the header of safetensors, from the size of all others."""
    tensors = elements = 0
    for path in files:
        if path.suffix == ".json":  # the index of several files
            continue
        if path.suffix == ".safetensors":
            header = read_safetensors_header(path)
            tensors += len(header)
            elements += sum(math.prod(shape) for shape in header.values())
        else:
            check_not_inflated(path)
            # no tensor in a pickle takes less than a few bytes of names
            tensors += path.stat().st_size // 64
            elements += path.stat().st_size
    return tensors, elements


def read_safetensors_header(path: Path) -> dict[str, list[int]]:
    """Names and shapes in a safetensors file, without its tensors. Raises ValueError for a damaged one."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        return {
            name: [int(side) for side in about["shape"]] for name, about in header.items() if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}; fetch or write it again") from error


def check_memory_of(tensors: dict[str, torch.Tensor], where: object) -> dict[str, torch.Tensor]:
    """The tensors, if each has all its elements in memory. Raises ValueError for one that repeats a few (stride 0)."""
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{where}: {name} claims {tuple(tensor.shape)} and holds fewer numbers; it is damaged")
    return tensors
