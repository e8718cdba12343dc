"""What a run will cost, from a few real steps in a folder that is thrown away: FLOPs, memory, wall time."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from zepad_mm.data import LabelledImages
from zepad_mm.defences.base import Defence, Student
from zepad_mm.training.checkpoint import save_best
from zepad_mm.training.dataloader import TrainData, steps_of
from zepad_mm.training.feature_cache import encode_images
from zepad_mm.training.flops import count_flops
from zepad_mm.training.loop import METRICS, fit
from zepad_mm.training.settings import TrainSettings
from zepad_mm.training.validation import validate
from zepad_mm.utils.config import Config
from zepad_mm.utils.distributed import make_accelerator

DEVICES = (1, 2, 8, 64)
PROBE_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Plan(Config):
    """The cost of a run on devices like the one it was probed on."""

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
        """Seconds of the run on so many devices that split the same batch, without what they tell each other."""
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
                f"{self.steps} steps of {self.batch_size} pictures, {self.step_s:.3g} s and {self.step_flops:.3g} FLOP "
                f"each; {self.flops:.3g} FLOP in all; {self.peak_mb:.0f} MB at the peak on one device",
                "devices  wall time  sent by each per step (on paper: the time this takes is not in the wall time)",
                *rows,
            ]
        )


def plan(
    student: Student,
    train: TrainData,
    validation: LabelledImages | None,
    defence: Defence,
    settings: TrainSettings,
    accelerator: Accelerator | None = None,
) -> Plan:
    """Run a few steps of :func:`fit` and one batch of validation, and reckon up the run. Nothing is kept on disk.

    Args: as of :func:`fit`. The student is used up: its weights have moved afterwards.

    Raises:
        ValueError: as :func:`fit`, or more than one process.
    """
    accelerator = accelerator or make_accelerator()
    if accelerator.num_processes != 1:
        raise ValueError(
            f"--plan probes one device, running as {accelerator.num_processes} processes; start it without "
            "accelerate launch, the table covers larger numbers"
        )
    cuda = accelerator.device.type == "cuda"
    total, per_epoch = steps_of(train, settings)
    short = replace(settings, steps=PROBE_STEPS, log_every=1, resume="never", cache_dir=None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        fit(student, train, None, defence, short, out=out / "timed", accelerator=accelerator)
        lines = [json.loads(line) for line in (out / "timed" / METRICS).read_text(encoding="utf-8").splitlines()]
        # the first step warms up: caches, kernels, compilation
        step_s = settings.batch_size / statistics.median([line["images_per_s"] for line in lines[1:]])
        write_s = _seconds(lambda: save_best(out, student, 0), cuda)
        shared_s, flops = 0.0, 0.0
        if validation is not None:
            few = replace(validation, images=validation.images[: settings.validation_batch_size],
                          labels=validation.labels[: settings.validation_batch_size])  # fmt: skip
            checks = (1 + -(-total // (settings.validation_every or per_epoch))) * len(validation) / len(few)
            epsilon = defence.epsilon if settings.validation_epsilon is None else settings.validation_epsilon

            def check() -> None:
                validate(
                    student,
                    few,
                    accelerator,
                    epsilon=epsilon,
                    attack_steps=settings.validation_attack_steps,
                    batch_size=settings.validation_batch_size,
                )

            shared_s += checks * _seconds(check, cuda)
            flops += checks * count_flops(check)
        peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else highest_mb()
        step_flops = float(
            count_flops(
                lambda: fit(
                    student, train, None, defence, replace(short, steps=1), out=out / "counted", accelerator=accelerator
                )
            )
        )
    if defence.needs_original and settings.augment == "none" and isinstance(train, LabelledImages):
        # the counted step came with its own clean targets; the run computes each picture's once
        images = train.images[: settings.batch_size]
        size, pictures = settings.validation_batch_size, min(len(train), total * settings.batch_size)
        targets = count_flops(lambda: encode_images(student.encoder, images, size))
        step_flops -= targets
        flops += targets * pictures / len(images)
        shared_s += _seconds(lambda: encode_images(student.encoder, images, size), cuda) * pictures / len(images)
    saves = total // settings.checkpoint_every + 1 + -(-total // (settings.validation_every or per_epoch))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return Plan(
        steps=total,
        batch_size=settings.batch_size,
        step_s=step_s,
        shared_s=shared_s,
        alone_s=4 * saves * write_s,  # weights, two moments of Adam, and the selected weights beside them
        step_flops=step_flops,
        flops=flops + total * step_flops,
        peak_mb=peak,
        gradient_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trained),
    )


def _seconds(run: Callable[[], object], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def highest_mb() -> float:
    """The most memory that this process ever held."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage would begin with what the parent held
        return float(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 1e3
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
