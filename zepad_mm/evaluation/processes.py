"""The batches of an evaluation shared out between its processes; everything else each of them works out for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This one among those that evaluate together. All of them must ask for the same things in the same order."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that keeps and writes."""
        return self.rank == 0

    def shared(self, works: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The results of all works, in their order, each of them done by one process."""
        if self.world == 1:
            return [work() for work in works]
        from accelerate.utils import gather_object

        mine = [(number, work()) for number, work in enumerate(works) if number % self.world == self.rank]
        return [result for _, result in sorted(gather_object(mine), key=lambda entry: entry[0])]

    def agreed(self, result: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """What the first process has, on all of them: what follows from it is then the same on every one."""
        if self.world == 1:
            return result
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([result])[0]
