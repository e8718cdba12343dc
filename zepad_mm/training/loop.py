"""One loop for adversarial and benign tuning, on one process or many, that can be killed at any moment and resumed."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from zepad_mm.data import LabelledImages
from zepad_mm.defences.base import Batch, Defence, Student, split_batch
from zepad_mm.training.checkpoint import (
    CHECKPOINT,
    Position,
    load_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
)
from zepad_mm.training.dataloader import Share, TrainData, augment, order_of, shares, steps_of
from zepad_mm.training.feature_cache import clean_targets
from zepad_mm.training.nan_guard import check_finite
from zepad_mm.training.run_setup import (
    Objective,
    check_folder,
    check_run,
    identity_of,
    make_optimizer,
    quicken,
    training_mode,
)
from zepad_mm.training.settings import TrainSettings
from zepad_mm.training.tracking import start_trackers, track, write_samples
from zepad_mm.training.validation import Validation, validate
from zepad_mm.utils.distributed import make_accelerator
from zepad_mm.utils.io import write_text
from zepad_mm.utils.seeding import derived_generator, seeded

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` did. The student holds the selected weights.

    Attributes:
        steps: optimiser steps in all, over every resumption.
        best_step: the step whose weights were selected; 0: no tuned weights were better than the untuned ones.
        validation: figures of the selected weights; None without a validation set.
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

    Raises:
        ValueError: labels beyond the head's classes, too few images for a batch, nothing to train, a folder that holds
            another run. FloatingPointError: the loss or the gradient is no number; the checkpoint before it is intact.
    """
    run = _Run(
        student, train, validation, defence, settings, out=Path(out), accelerator=accelerator or make_accelerator()
    )
    return run.fit()


class _Run:
    """State of one call of :func:`fit`."""

    def __init__(
        self,
        student: Student,
        train: TrainData,
        validation: LabelledImages | None,
        defence: Defence,
        settings: TrainSettings,
        *,
        out: Path,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.train, self.validation = student, train, validation
        self.defence, self.settings, self.out, self.accelerator = defence, settings, out, accelerator
        self.rank, self.world, self.device = accelerator.process_index, accelerator.num_processes, accelerator.device
        check_run(student, train, validation, defence, settings)
        check_folder(out, settings, self.world)
        self.total, self.per_epoch = steps_of(train, settings)
        self.identity = identity_of(student, train, validation, defence, settings, self.world)
        student.to(self.device)
        if not defence.trains_head:
            student.head.requires_grad_(False)
        self.teacher = copy.deepcopy(student.encoder).eval().requires_grad_(False) if defence.needs_original else None
        quicken(student, settings)
        self.objective, self.optimizer = accelerator.prepare(
            Objective(student, defence), make_optimizer(student, settings)
        )
        self.latest = (torch.empty(0), torch.empty(0))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def fit(self) -> FitResult:
        position = self._start()
        start_trackers(self.accelerator, self.out, self.identity)
        originals = self._originals()
        if originals is not None:
            self.teacher = None  # it has said all that it will be asked
        began, spent = time.perf_counter(), position.seconds
        if position.step == 0 and position.best_step is None:
            position = self._validated(position)
        bar = tqdm(
            total=self.total,
            initial=position.step,
            desc=self.defence.name,
            disable=not self.accelerator.is_main_process,
        )
        window, window_steps = time.perf_counter(), 0
        feed = shares(
            self.train, self.settings, self.rank, self.world, position.step, self.total, self.device.type == "cuda"
        )
        for step, share in zip(range(position.step, self.total), feed, strict=True):
            batch = self._batch(step, share, originals)
            figures = self._step(step, batch)
            done = step + 1
            window_steps += 1
            bar.update()
            position = Position(done, position.best_step, position.best, spent + time.perf_counter() - began)
            if done % self.settings.log_every == 0 or done == self.total:
                figures["images_per_s"] = window_steps * self.settings.batch_size / (time.perf_counter() - window)
                self._record({"step": done, **figures})
                bar.set_postfix(loss=f"{figures['loss']:.4g}")
                window, window_steps = time.perf_counter(), 0
            if done % (self.settings.validation_every or self.per_epoch) == 0 or done == self.total:
                self._show(done)
                position = self._validated(position)
                window, window_steps = time.perf_counter(), 0
            elif done % self.settings.checkpoint_every == 0:
                self._save(position)
        bar.close()
        return self._finish(position)

    def _start(self) -> Position:
        position = Position(0, None, None, 0.0)
        if (self.out / CHECKPOINT).exists():
            position = load_checkpoint(self.out, self.student, self.optimizer, self.identity)
            log.info("resuming %s at step %d of %d", self.out, position.step, self.total)
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            _cut_metrics(self.out / METRICS, position)
        self.accelerator.wait_for_everyone()
        return position

    def _originals(self) -> Tensor | None:
        """(N, D) features of the training images under the untuned encoder, each computed once; None if not wanted.

        With augmentation no picture comes twice, and a set that is not in memory is not read twice: then the teacher
        runs in the loop. A run shorter than an epoch encodes only what it will see.
        """
        if self.teacher is None or self.settings.augment != "none" or not isinstance(self.train, LabelledImages):
            return None
        indices = torch.arange(len(self.train))
        if self.total < self.per_epoch:
            indices = order_of(self.train, self.settings, 0)[: self.total * self.settings.batch_size]
        size, accelerator = self.settings.validation_batch_size, self.accelerator
        return clean_targets(self.teacher, self.train, indices, size, accelerator, self.settings.cache_dir)

    def _batch(self, step: int, share: Share, originals: Tensor | None) -> Batch:
        """This process's share of the global batch of ``step``, on its device, augmented, with its clean targets."""
        images, labels, indices = share
        images = images.to(self.device, non_blocking=True)
        rows = slice(self.rank, self.settings.batch_size, self.world)
        images = augment(images, self.settings.augment, derived_generator(self.settings.seed, "augment", step), rows)
        original = None
        if originals is not None:
            original = originals[indices.to(self.device)]
        elif self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                original = self.teacher(images).float()
        return Batch(images, labels.to(self.device), indices, original)

    def _step(self, step: int, batch: Batch) -> dict[str, Any]:
        """One optimiser step; its figures for the log, means over the processes when the step is one that is logged."""
        settings, optimizer = self.settings, self.optimizer
        factor = settings.lr_factor(step, self.total, self.per_epoch)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        epsilon = self.defence.epsilon * settings.epsilon_factor(step)
        # cleared before the attack and not after it: gen_af_released leaves gradients on purpose
        optimizer.zero_grad()
        figures: dict[str, Tensor] = {}
        generator = derived_generator(settings.seed, "attack", step, self.rank)
        for part, few in enumerate(split_batch(batch, settings.accumulation)):
            last = part == settings.accumulation - 1
            # gradients of all parts travel between processes once, with the last
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                losses, attacked = self._gradients(step, part, few, epsilon, generator)
            figures = {name: figures.get(name, 0) + value / settings.accumulation for name, value in losses.items()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = self.accelerator.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
        if self.accelerator.scaler is None:  # the fp16 scaler skips steps of infinite gradients by itself
            self._check_finite(norm, "gradient", step, few, attacked)
        optimizer.step()
        self.student.eval()
        if self.world > 1 and ((step + 1) % settings.log_every == 0 or step + 1 == self.total):
            figures = self.accelerator.reduce(figures, "mean")  # type: ignore[assignment]
        values = {name: float(value) for name, value in figures.items()}
        return {**values, "gradient_norm": float(norm), "lr": settings.lr_encoder * factor, "epsilon": epsilon}

    def _gradients(
        self, step: int, part: int, batch: Batch, epsilon: float, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Attack one part of a batch and back-propagate its loss; (the loss and its parts, the attacked images)."""
        settings = self.settings
        self.student.eval()
        with self.accelerator.autocast():
            attacked = self.defence.craft(self.student, batch, epsilon, generator)
        training_mode(self.student, settings.bn_mode)
        with seeded(self.device, settings.seed, "forward", step, self.rank, *([part] if part else [])):
            total, parts = self.objective(batch.images, batch.labels, batch.indices, batch.original, attacked)
        self._check_finite(total.detach(), "loss", step, batch, attacked)
        self.latest = (batch.images, attacked)
        self.accelerator.backward(total / settings.accumulation)
        return {"loss": total.detach(), **parts}, attacked

    def _check_finite(self, value: Tensor | None, what: str, step: int, batch: Batch, attacked: Tensor) -> None:
        about = {"data": self.train.name, "rank": self.rank, **self.identity["defence"], **self.settings.to_dict()}
        check_finite(value, what, step, batch, attacked, out=self.out, about=about)

    def _validated(self, position: Position) -> Position:
        """Validate, keep the weights if they are the best so far, write a checkpoint."""
        best_step, best = position.best_step, position.best
        if self.validation is None:
            best_step, best = position.step, None
        else:
            figures = self._validate(self.validation)
            self._record({"step": position.step, "validation": figures.to_dict()})
            before = None if best is None else Validation.from_dict(best).score(self.settings.selection)
            score = figures.score(self.settings.selection)
            if before is None or score > before or self.settings.selection == "last":
                best_step, best = position.step, figures.to_dict()
        if best_step == position.step and self.accelerator.is_main_process:
            save_best(self.out, self.student, position.step)
        position = Position(position.step, best_step, best, position.seconds)
        self._save(position)
        return position

    def _validate(self, data: LabelledImages) -> Validation:
        settings = self.settings
        epsilon = settings.validation_epsilon
        view = self.defence.selection_view(self.student)
        return validate(
            self.student,
            data,
            self.accelerator,
            epsilon=self.defence.epsilon if epsilon is None else epsilon,
            attack_steps=settings.validation_attack_steps,
            batch_size=settings.validation_batch_size,
            view=None if view == self.student.logits else view,
        )

    def _save(self, position: Position) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(self.out, self.student, self.optimizer, position, self.identity)
        self.accelerator.wait_for_everyone()

    def _show(self, step: int) -> None:
        images, attacked = (pictures[: self.settings.samples] for pictures in self.latest)
        if self.accelerator.is_main_process and len(images) and attacked.shape == images.shape:
            write_samples(self.accelerator, self.out, step, images, attacked)

    def _record(self, line: dict[str, Any]) -> None:
        track(self.accelerator, line)
        if self.accelerator.is_main_process:
            with (self.out / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _finish(self, position: Position) -> FitResult:
        best_step = position.best_step or 0
        load_best(self.out, self.student, best_step)
        self.student.eval()
        if best_step == 0 and self.accelerator.is_main_process:
            log.warning("no tuned weights beat the untuned ones on validation: %s keeps the untuned ones", self.out)
        figures = None if position.best is None else Validation.from_dict(position.best)
        return FitResult(position.step, best_step, figures, position.seconds)


def _cut_metrics(path: Path, position: Position) -> None:
    """Drop lines written after the checkpoint: the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the kill came in the middle of a line
            break
        if entry["step"] <= position.step and position.best_step is not None:
            kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))
