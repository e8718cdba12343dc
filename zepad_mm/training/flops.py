"""How much arithmetic a piece of code is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


class _Nowhere:
    """In place of torch's module tracker, whose hooks refuse gradients of leaves, such as pictures under attack."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def _convolution_backward(
    gradient: Any, images: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, wanted: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    """As much as the forward pass for each of the two gradients; torch's own rule forgets the groups."""
    pixels = math.prod(images if transposed else gradient)
    return 2 * pixels * math.prod(weight[1:]) * sum(bool(each) for each in wanted[:2])


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attentions that ``run()`` makes, two for each multiply-add."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
    )
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    with counter:
        run()
    return int(counter.get_total_flops())
