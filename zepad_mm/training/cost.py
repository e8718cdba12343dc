"""Estimate what a run costs from a few measured steps: FLOPs, memory, wall time."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from zepad_mm.data import LabelledImages
from zepad_mm.defences.base import Defence, Student
from zepad_mm.training.checkpoint import save_best
from zepad_mm.training.checks import check_run
from zepad_mm.training.dataloader import steps_of
from zepad_mm.training.feature_cache import encode_images
from zepad_mm.training.loop import Trainer
from zepad_mm.training.settings import TrainData, TrainSettings
from zepad_mm.training.validation import validate
from zepad_mm.utils.config import Config
from zepad_mm.utils.distributed import make_accelerator

DEVICES = (1, 2, 8, 64)
MEASURED_STEPS = 4  # the first one warms up: caches, kernels, compilation


@dataclass(frozen=True, kw_only=True)
class CostEstimate(Config):
    """The cost of a run on devices like the one it was measured on."""

    steps: int
    batch_size: int
    step_s: float  # seconds of one optimiser step on one device
    shared_s: float  # seconds of clean targets and validations, which devices share
    alone_s: float  # seconds of checkpoints, which one device writes
    step_flops: float
    flops: float  # of the whole run
    peak_mb: float  # of the GPU's memory, or of the process where there is none, at this batch on one device
    gradient_bytes: int  # that each step averages over the devices

    def wall_s(self, devices: int = 1) -> float:
        """Seconds of the run on ``devices`` that split the same batch, without their communication."""
        return (self.steps * self.step_s + self.shared_s) / devices + self.alone_s

    def sent_bytes(self, devices: int) -> float:
        """Bytes that each device sends per step in a ring all-reduce."""
        return 2 * (devices - 1) / devices * self.gradient_bytes

    def __str__(self) -> str:
        rows = [
            f"{count:>7}  {_clock(self.wall_s(count)):>9}  {self.sent_bytes(count) / 1e6:>9.2f} MB" for count in DEVICES
        ]
        return "\n".join(
            [
                f"{self.steps} steps of {self.batch_size} images, {self.step_s:.3g} s and {self.step_flops:.3g} FLOP "
                f"each; {self.flops:.3g} FLOP in all; {self.peak_mb:.0f} MB at the peak on one device",
                "devices  wall time  sent by each per step (computed; the wall time does not include it)",
                *rows,
            ]
        )


def estimate_cost(
    student: Student,
    train: TrainData,
    validation: LabelledImages | None,
    defence: Defence,
    settings: TrainSettings,
    accelerator: Accelerator | None = None,
) -> CostEstimate:
    """Measure a few steps of :func:`fit` and one batch of validation, and extrapolate to the whole run.

    Args: as of :func:`fit`. The student is consumed: its weights change.

    Raises:
        ValueError: as :func:`fit`, or more than one process.
    """
    accelerator = accelerator or make_accelerator()
    if accelerator.num_processes != 1:
        raise ValueError(
            f"--plan measures one device, running as {accelerator.num_processes} processes; start it without "
            "accelerate launch, the table covers larger numbers"
        )
    check_run(student, train, validation, defence, settings)
    total, per_epoch = steps_of(train, settings)
    cuda = accelerator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    short = replace(settings, steps=MEASURED_STEPS + 1, log_every=1, cache_dir=None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(student, train, defence, short, out=Path(folder), accelerator=accelerator)
        step_s, step_flops = _measure_steps(trainer, cuda)
        write_s = _seconds(lambda: save_best(Path(folder), student, 0), cuda)
    validations = 1 + -(-total // (settings.validation_every or per_epoch))
    measured = _measure_validation(student, validation, defence, settings, accelerator)
    shared_s, shared_flops = (validations * value for value in measured)
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else peak_process_mb()
    if trainer.targets is not None and isinstance(train, LabelledImages):
        target_s, target_flops = _measure_targets(student, train, settings, cuda)
        images = min(len(train), total * settings.batch_size)
        shared_s, shared_flops = shared_s + images * target_s, shared_flops + images * target_flops
    saves = total // settings.checkpoint_every + validations
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return CostEstimate(
        steps=total,
        batch_size=settings.batch_size,
        step_s=step_s,
        shared_s=shared_s,
        alone_s=4 * saves * write_s,  # weights, two moments of Adam, and the selected weights beside them
        step_flops=step_flops,
        flops=shared_flops + total * step_flops,
        peak_mb=peak,
        gradient_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trained),
    )


def _measure_steps(trainer: Trainer, cuda: bool) -> tuple[float, float]:
    """(median seconds of a step with its data, FLOPs of a step)."""
    trainer.encode_clean_targets()
    batches = trainer.batches(0, MEASURED_STEPS + 1)
    seconds = [_seconds(lambda: trainer.step(*next(batches)), cuda) for _ in range(MEASURED_STEPS)]
    return statistics.median(seconds[1:]), float(count_flops(lambda: trainer.step(*next(batches))))


def _measure_validation(
    student: Student,
    validation: LabelledImages | None,
    defence: Defence,
    settings: TrainSettings,
    accelerator: Accelerator,
) -> tuple[float, float]:
    """(seconds, FLOPs) of one validation, from one batch."""
    if validation is None:
        return 0.0, 0.0
    size = settings.validation_batch_size
    few = replace(validation, images=validation.images[:size], labels=validation.labels[:size])
    epsilon = defence.epsilon if settings.validation_epsilon is None else settings.validation_epsilon
    steps = settings.validation_attack_steps

    def run() -> None:
        validate(student, few, accelerator, epsilon=epsilon, attack_steps=steps, batch_size=size)

    batches = len(validation) / len(few)
    return batches * _seconds(run, accelerator.device.type == "cuda"), batches * count_flops(run)


def _measure_targets(
    student: Student, train: LabelledImages, settings: TrainSettings, cuda: bool
) -> tuple[float, float]:
    """(seconds, FLOPs) of the clean target of one image, from one batch."""
    images = train.images[: settings.batch_size]

    def run() -> None:
        encode_images(student.encoder, images, settings.validation_batch_size)

    return _seconds(run, cuda) / len(images), count_flops(run) / len(images)


class _NoModuleTracker:
    """Replaces torch's module tracker, whose hooks refuse gradients of leaves, such as attacked images."""

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
    counter.mod_tracker = _NoModuleTracker()  # type: ignore[assignment]
    with counter:
        run()
    return int(counter.get_total_flops())


def _seconds(run: Callable[[], object], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_process_mb() -> float:
    """The largest memory that this process has held, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage would begin with what the parent held
        return float(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 1e3
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
