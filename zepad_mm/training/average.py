"""The average of the weights over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The exponential moving average of what trains in a student; younger than the decay allows, it forgets faster.

    Args:
        student: its parameters are followed; those that require a gradient.
        decay: share of the average that stays at each step; 0: there is none, and nothing is done.

    Attributes:
        weights: the average of each parameter, by name.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        followed = {name: part for name, part in student.named_parameters() if part.requires_grad and decay > 0}
        self._parameters: list[Tensor] = list(followed.values())
        self.weights = {name: part.detach().clone() for name, part in followed.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after ``step`` (from 0) in."""
        if self.weights:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.weights.values()), self._parameters, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the student has the average as its weights."""
        averages = list(self.weights.values())
        kept = [parameter.detach().clone() for parameter in self._parameters]
        try:
            _copy(averages, self._parameters)
            yield
        finally:
            _copy(kept, self._parameters)


@torch.no_grad()
def _copy(values: list[Tensor], parameters: list[Tensor]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
