"""Processes: the accelerator on the devices that exist, and work shared between processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from zepad_mm.utils.locks import claim
from zepad_mm.utils.progress import log_file
from zepad_mm.utils.registry import check_choice

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")
PRECISIONS = ("no", "fp16", "bf16")
TRACKERS = ("none", "tensorboard", "trackio")


@dataclass(frozen=True)
class Processes:
    """This one among those that evaluate together. All of them must ask for the same things in the same order."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator | None) -> Processes:
        """Those of an accelerator; this one alone for None."""
        return cls() if accelerator is None else cls(accelerator.process_index, accelerator.num_processes)

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

    def broadcast(self, result: Result) -> Result:
        """Return the result of the first process on all of them, so that they go on alike."""
        if self.world == 1:
            return result
        from accelerate.utils import broadcast_object_list

        shared: Result = broadcast_object_list([result])[0]
        return shared


@contextmanager
def claim_together(folder: str | Path, accelerator: Accelerator | None = None) -> Iterator[None]:
    """Keep other runs out of an output folder; the first process holds the lock, all raise where it is refused.

    What is logged meanwhile is kept in the folder (:mod:`zepad_mm.utils.progress`).

    Raises ValueError when another run writes to the folder, or OSError when it cannot be written to.
    """
    with ExitStack() as stack:
        refused: Exception | None = None
        if accelerator is None or accelerator.is_main_process:
            try:
                stack.enter_context(claim(folder))
            except (ValueError, OSError) as error:
                refused = error
        if accelerator is not None and accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            refused = broadcast_object_list([refused])[0]
        if refused is not None:
            raise refused
        if accelerator is None or accelerator.is_main_process:
            stack.enter_context(log_file(folder))
        yield


def make_accelerator(
    processes: int | None = None,
    mixed_precision: str | None = None,
    tracker: str = "none",
    folder: str | Path | None = None,
) -> Accelerator:
    """An accelerator on whatever is there: GPUs, or gloo processes on the CPU.

    Args:
        processes: how many the caller counts on, checked where it is given; ``accelerate launch --cpu
            --num_processes 2`` silently starts one.
        mixed_precision: "no", "fp16" or "bf16"; None: what ``accelerate launch`` or its config file says, else "no".
        tracker: "none", "tensorboard" or "trackio"; ``metrics.jsonl`` is written whatever it is.
        folder: where tensorboard writes.

    Raises:
        ValueError: another number of processes than asked for is running, a tracker that is not there, or FSDP,
            DeepSpeed and the like.
    """
    from accelerate import Accelerator

    check_choice("tracker", tracker, TRACKERS)
    check_choice("mixed_precision", mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), PRECISIONS)
    if tracker != "none" and find_spec(tracker) is None:
        raise ValueError(f"tracker: {tracker} is not installed; pip install 'zepad-mm[trackers]'")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
    )
    if "MULTI" not in (kind := accelerator.distributed_type.value) and kind != "NO":
        raise ValueError(
            f"{kind} splits weights over processes, and attacks and checkpoints here want them whole; launch with "
            "--multi_gpu, and save memory by adaptation='lora', gradient_checkpointing or accumulation"
        )
    asked = processes or int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise ValueError(
            f"asked for {asked} processes, running as {accelerator.num_processes}: a machine without a GPU also wants "
            f"'accelerate launch --multi_gpu --num_processes {asked} RECIPE ...' or "
            f"'torchrun --nproc-per-node {asked} RECIPE ...' (--cpu starts a single process)"
        )
    return accelerator
