"""The loop of adversarial and benign tuning, on one process or many; a run can be killed and resumed at any moment.

:func:`fit` is the loop: validate, log, save. :class:`Trainer` takes its steps: fetch and augment a batch, attack it,
back-propagate the loss of the defence, update the weights.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from zepad_mm.data import LabelledImages
from zepad_mm.defences.base import Batch, Defence, Student, split_batch
from zepad_mm.encoders import Encoder
from zepad_mm.training.augmentation import augment
from zepad_mm.training.average import WeightAverage
from zepad_mm.training.checkpoint import (
    CHECKPOINT,
    Position,
    load_best,
    load_checkpoint,
    run_identity,
    save_best,
    save_checkpoint,
)
from zepad_mm.training.checks import check_folder, check_run
from zepad_mm.training.dataloader import Share, order_of, shares, steps_of
from zepad_mm.training.feature_cache import clean_targets
from zepad_mm.training.objective import Objective
from zepad_mm.training.settings import TrainData, TrainSettings
from zepad_mm.training.student import (
    apply_performance_settings,
    freeze_unused,
    leave_inference_mode,
    make_optimizer,
    set_training_mode,
)
from zepad_mm.training.tracking import check_finite, start_trackers, track, write_samples
from zepad_mm.training.validation import Validation, validate
from zepad_mm.utils.distributed import claim_together, make_accelerator
from zepad_mm.utils.io import append_line, keep_lines
from zepad_mm.utils.progress import Progress, say
from zepad_mm.utils.seeding import derived_generator, seeded
from zepad_mm.utils.stopping import Stopped, StopRequest, stop_at_next_step

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` did. The student holds the selected weights.

    Attributes:
        steps: optimiser steps in all, over every resumption.
        best_step: the step whose weights were selected; 0: no tuned weights were better than the untuned ones.
        validation: metrics of the selected weights; None without a validation set.
        seconds: wall time over every resumption.
    """

    steps: int
    best_step: int
    validation: Validation | None
    seconds: float


def fit(
    student: Student,
    train: TrainData,
    validation: LabelledImages | None,
    defence: Defence,
    settings: TrainSettings,
    *,
    out: str | Path,
    accelerator: Accelerator | None = None,
    original: Encoder | None = None,
) -> FitResult:
    """Tune ``student`` in place.

    Trains every parameter that requires a gradient: all of the encoder, or its LoRA adapter alone, and the head if it
    has parameters and the defence gives them a gradient. Writes ``metrics.jsonl``, ``checkpoint.safetensors`` and
    ``best-STEP.safetensors`` and ``samples/STEP.png`` to ``out``, a folder that all processes must see.

    Args:
        student: as it is before tuning, also when a run is resumed.
        train: in memory, on disk or streamed (a stream wants ``settings.steps``).
        validation: disjoint from it; weights are selected on it, or the last ones kept where it is None.
        defence: the objective.
        settings: everything else.
        out: folder of this run.
        accelerator: from :func:`make_accelerator`; None makes one.
        original: the encoder whose clean features the defence preserves; None: the student's as it comes. Give it to
            go on tuning an encoder that is robust already.

    Raises:
        ValueError: labels beyond the head's classes, too few images for a batch, nothing to train, a folder that holds
            another run or is in use by one. FloatingPointError: a non-finite loss or gradient; the checkpoint before it
            is intact. OSError: no room; the message names the file. Stopped: after SIGINT or SIGTERM, once the step is
            done and saved.
    """
    accelerator, out = accelerator or make_accelerator(), Path(out)
    check_run(student, train, validation, defence, settings)
    check_folder(out, settings, accelerator.num_processes)
    identity = run_identity(student, train, validation, defence, settings, accelerator.num_processes, original)
    normal = torch.inference_mode(False), torch.enable_grad()
    with claim_together(out, accelerator), stop_at_next_step() as stop, normal[0], normal[1]:
        trainer = Trainer(student, train, defence, settings, out=out, accelerator=accelerator, original=original)
        return _Run(trainer, validation, identity, stop).run()


class _Run:
    """One call of :func:`fit`: the steps of a trainer, with validation, log and checkpoints."""

    def __init__(
        self, trainer: Trainer, validation: LabelledImages | None, identity: dict[str, Any], stop: StopRequest
    ) -> None:
        self.trainer, self.validation, self.identity, self.stop = trainer, validation, identity, stop
        self.settings, self.out, self.accelerator = trainer.settings, trainer.out, trainer.accelerator
        self.student = trainer.student

    def run(self) -> FitResult:
        trainer, settings = self.trainer, self.settings
        position = self._resume()
        start_trackers(self.accelerator, self.out, self.identity)
        trainer.encode_clean_targets()
        began, seconds_before = time.perf_counter(), position.seconds
        if position.step == 0 and position.best_step is None:
            position = self._validate_and_save(position)
        main = self.accelerator.is_main_process
        name = f"tuning by {trainer.defence.name}"
        bar = Progress(total=trainer.total, initial=position.step, desc=name, unit="step", disable=not main)
        window, window_steps = time.perf_counter(), 0
        for step, batch in trainer.batches(position.step, trainer.total):
            metrics = trainer.step(step, batch)
            done, window_steps = step + 1, window_steps + 1
            bar.update()
            position = replace(position, step=done, seconds=seconds_before + time.perf_counter() - began)
            if done % settings.log_every == 0 or done == trainer.total:
                metrics["images_per_s"] = window_steps * settings.batch_size / (time.perf_counter() - window)
                self._log({"step": done, **metrics})
                bar.set_postfix(loss=f"{metrics['loss']:.4g}")
                window, window_steps = time.perf_counter(), 0
            if done % (settings.validation_every or trainer.per_epoch) == 0 or done == trainer.total:
                self._write_samples(done)
                position = self._validate_and_save(position)
                window, window_steps = time.perf_counter(), 0
            elif done % settings.checkpoint_every == 0:
                self._save(position)
            if done < trainer.total and self._asked_to_stop():
                bar.close()
                self._stop(position)
        bar.close()
        return self._finish(position)

    def _asked_to_stop(self) -> bool:
        """Whether one of the processes got SIGINT or SIGTERM."""
        if self.accelerator.num_processes == 1:
            return bool(self.stop)
        flag = torch.tensor(float(bool(self.stop)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum"))

    def _stop(self, position: Position) -> NoReturn:
        self._save(position)
        raise Stopped(
            f"{self.stop.signal or 'stopped'}: step {position.step} of {self.trainer.total} is saved in {self.out}; "
            "start it again with the same settings to go on"
        )

    def _resume(self) -> Position:
        """The position of the checkpoint in the folder, which is loaded; the first one where there is none."""
        position = Position(step=0, best_step=None, best=None, seconds=0.0)
        if (self.out / CHECKPOINT).exists():
            trainer = self.trainer
            position = load_checkpoint(self.out, self.student, trainer.optimizer, trainer.average, self.identity)
            say(log, "resuming %s at step %d of %d", self.out, position.step, self.trainer.total)
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            # lines after the checkpoint are written again by the resumed run
            keep_lines(
                self.out / METRICS, lambda line: line["step"] <= position.step and position.best_step is not None
            )
        self.accelerator.wait_for_everyone()
        return position

    def _validate_and_save(self, position: Position) -> Position:
        """Validate, keep the weights if they are the best so far, write a checkpoint."""
        best_step, best = position.best_step, position.best
        if self.validation is None:
            best_step, best = position.step, None
        else:
            with self.trainer.average.applied():
                metrics = self._validate(self.validation)
            self._log({"step": position.step, "validation": metrics.to_dict()})
            before = None if best is None else Validation.from_dict(best).score(self.settings.selection)
            score = metrics.score(self.settings.selection)
            if before is None or score > before or self.settings.selection == "last":
                best_step, best = position.step, metrics.to_dict()
        if best_step == position.step and self.accelerator.is_main_process:
            with self.trainer.average.applied():
                save_best(self.out, self.student, position.step)
        position = replace(position, best_step=best_step, best=best)
        self._save(position)
        return position

    def _validate(self, data: LabelledImages) -> Validation:
        settings, defence = self.settings, self.trainer.defence
        epsilon = settings.validation_epsilon
        view = defence.selection_view(self.student)
        return validate(
            self.student,
            data,
            self.accelerator,
            epsilon=defence.epsilon if epsilon is None else epsilon,
            attack_steps=settings.validation_attack_steps,
            batch_size=settings.validation_batch_size,
            view=None if view == self.student.logits else view,
        )

    def _save(self, position: Position) -> None:
        if self.accelerator.is_main_process:
            trainer = self.trainer
            save_checkpoint(self.out, self.student, trainer.optimizer, trainer.average, position, self.identity)
        self.accelerator.wait_for_everyone()

    def _write_samples(self, step: int) -> None:
        images, attacked = (part[: self.settings.samples] for part in self.trainer.latest)
        if self.accelerator.is_main_process and len(images) and attacked.shape == images.shape:
            write_samples(self.accelerator, self.out, step, images, attacked)

    def _log(self, line: dict[str, Any]) -> None:
        track(self.accelerator, line)
        if self.accelerator.is_main_process:
            append_line(self.out / METRICS, json.dumps(line))

    def _finish(self, position: Position) -> FitResult:
        best_step = position.best_step or 0
        load_best(self.out, self.student, best_step)
        self.student.eval()
        if best_step == 0 and self.accelerator.is_main_process:
            log.warning("no tuned weights beat the untuned ones on validation: %s keeps the untuned ones", self.out)
        metrics = None if position.best is None else Validation.from_dict(position.best)
        return FitResult(position.step, best_step, metrics, position.seconds)


class Trainer:
    """The steps of a run: what :func:`fit` and the cost estimate repeat.

    Args: as of :func:`fit`, checked by :func:`check_run`.

    Attributes:
        total, per_epoch: optimiser steps of the run, and of an epoch.
        latest: images of the latest batch, clean and attacked.
    """

    def __init__(
        self,
        student: Student,
        train: TrainData,
        defence: Defence,
        settings: TrainSettings,
        *,
        out: Path,
        accelerator: Accelerator,
        original: Encoder | None = None,
    ) -> None:
        self.student, self.train, self.defence, self.settings = student, train, defence, settings
        self.out, self.accelerator = out, accelerator
        self.rank, self.world, self.device = accelerator.process_index, accelerator.num_processes, accelerator.device
        self.total, self.per_epoch = steps_of(train, settings)
        leave_inference_mode(student)
        defence.prepare(student)
        student.to(self.device)
        if not defence.trains_head:
            student.head.requires_grad_(False)
        self.teacher: Encoder | None = None
        if defence.needs_original:
            self.teacher = copy.deepcopy(original or student.encoder).to(self.device).eval().requires_grad_(False)
        self.targets: Tensor | None = None
        freeze_unused(student.encoder)
        apply_performance_settings(student, settings)
        self.objective, self.optimizer = accelerator.prepare(
            Objective(student, defence), make_optimizer(student, settings)
        )
        self.average = WeightAverage(student, settings.ema_decay)
        self.latest = (torch.empty(0), torch.empty(0))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def encode_clean_targets(self) -> None:
        """Encode the training images by the untuned encoder, each once, and free that encoder.

        With augmentation no image occurs twice, and a set that is not in memory is not read twice: then the untuned
        encoder runs in every step. A run shorter than an epoch encodes only the images it will see.
        """
        if self.teacher is None or self.settings.augment != "none" or not isinstance(self.train, LabelledImages):
            return
        indices = torch.arange(len(self.train))
        if self.total < self.per_epoch:
            indices = order_of(self.train, self.settings, 0)[: self.total * self.settings.batch_size]
        size, accelerator = self.settings.validation_batch_size, self.accelerator
        self.targets = clean_targets(self.teacher, self.train, indices, size, accelerator, self.settings.cache_dir)
        self.teacher = None

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """(step, this process's share of its batch) for the steps from ``start`` to ``stop``."""
        at_home = isinstance(self.train, LabelledImages) and self.train.images.is_cuda
        pin = self.device.type == "cuda" and not at_home
        loader = shares(self.train, self.settings, self.rank, self.world, start, stop, pin)
        for step, share in zip(range(start, stop), loader, strict=True):
            yield step, self._batch(step, share)

    def _batch(self, step: int, share: Share) -> Batch:
        """A share on the device of this process, augmented, with its clean targets."""
        images, labels, indices = share
        images = images.to(self.device, non_blocking=True)
        rows = slice(self.rank, self.settings.batch_size, self.world)
        images = augment(images, self.settings.augment, derived_generator(self.settings.seed, "augment", step), rows)
        original = None
        if self.targets is not None:
            original = self.targets[indices.to(self.device)]
        elif self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                original = self.teacher(images).float()
        return Batch(images, labels.to(self.device), indices, original)

    def step(self, step: int, batch: Batch) -> dict[str, Any]:
        """One optimiser step; its metrics, means over the processes in the steps that are logged."""
        settings, optimizer = self.settings, self.optimizer
        factor = settings.lr_factor(step, self.total, self.per_epoch)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        epsilon = self.defence.epsilon * settings.epsilon_factor(step)
        # cleared before the attack and not after it: gen_af_released leaves gradients on purpose
        optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        generator = derived_generator(settings.seed, "attack", step, self.rank)
        for number, part in enumerate(split_batch(batch, settings.accumulation)):
            last = number == settings.accumulation - 1
            # gradients of all parts are reduced over the processes once, with the last
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                losses = self._attack_and_backward(step, number, part, epsilon, generator)
            sums = {name: sums.get(name, 0) + value / settings.accumulation for name, value in losses.items()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = self.accelerator.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
        if self.accelerator.scaler is None:  # the fp16 scaler skips steps of infinite gradients by itself
            self._check_finite(norm, "gradient", step, part, self.latest[1])
        optimizer.step()
        self.average.update(step)
        self.student.eval()
        logged = (step + 1) % settings.log_every == 0 or step + 1 == self.total
        if self.world > 1 and (logged or self.defence.has_state):
            sums = self.accelerator.reduce(sums, "mean")  # type: ignore[assignment]
        self.defence.update(self.student, sums)
        metrics = {name: float(value) for name, value in sums.items()}
        return {**metrics, "gradient_norm": float(norm), "lr": settings.lr_encoder * factor, "epsilon": epsilon}

    def _attack_and_backward(
        self, step: int, number: int, part: Batch, epsilon: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Attack one part of a batch and back-propagate its loss; the loss and its summands."""
        settings = self.settings
        self.student.eval()
        with self.accelerator.autocast():
            attacked = self.defence.craft(self.student, part, epsilon, generator)
        set_training_mode(self.student, settings.bn_mode)
        with seeded(self.device, settings.seed, "forward", step, self.rank, *([number] if number else [])):
            total, summands = self.objective(part.images, part.labels, part.indices, part.original, attacked)
        self._check_finite(total.detach(), "loss", step, part, attacked)
        self.latest = (part.images, attacked)
        self.accelerator.backward(total / settings.accumulation)
        return {"loss": total.detach(), **summands}

    def _check_finite(self, value: Tensor | None, what: str, step: int, batch: Batch, attacked: Tensor) -> None:
        defence = {"name": self.defence.name, **self.defence.to_dict()}
        about = {"data": self.train.name, "rank": self.rank, **defence, **self.settings.to_dict()}
        check_finite(value, what, step, batch, attacked, out=self.out, about=about)
