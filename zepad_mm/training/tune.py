"""Tune one encoder by one defence: build the student, fit it, write the encoder with its record."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import nn

from zepad_mm.data import LabelledImages
from zepad_mm.defences import DEFENCES, Defence, Student, make_defence
from zepad_mm.encoders import Encoder, LoraSettings, is_clip
from zepad_mm.training.artifacts import TUNED_RECORD, load_tuned, write_tuned
from zepad_mm.training.dataloader import size_of
from zepad_mm.training.loop import FitResult, fit
from zepad_mm.training.settings import UNIDENTIFYING, TrainData, TrainSettings
from zepad_mm.training.student import build_student
from zepad_mm.utils.atomic import complete_folder
from zepad_mm.utils.config import Config
from zepad_mm.utils.distributed import claim_together, make_accelerator
from zepad_mm.utils.io import read_json
from zepad_mm.utils.locks import output_folder
from zepad_mm.utils.progress import say
from zepad_mm.utils.provenance import check_identity

log = logging.getLogger(__name__)

RUN = "run"  # folder of the checkpoint and the metrics, beside the tuned encoder


@dataclass(frozen=True, kw_only=True)
class TuneSettings(Config):
    """What is tuned and how. The role of the branch is that of the defence: benign for "clean", else robust."""

    source: str = "open_clip:embedded"  # the public encoder to start from
    adaptation: Literal["full", "lora"] = "full"
    lora: LoraSettings = field(default_factory=LoraSettings)
    head: str = "auto"  # zero_shot, mlp, linear, probe; auto: zero_shot for CLIPs, else mlp, for fare probe
    prompts: str = "photo"  # prompt set or template of the zero-shot head
    defence: str = "tecoa"
    defence_options: dict[str, Any] = field(default_factory=dict)  # fields of the defence; unknown ones are refused
    settings: TrainSettings = field(default_factory=TrainSettings)


@dataclass(frozen=True)
class Tuned:
    """A tuned encoder, frozen and in eval mode, and the record that is stored beside it."""

    encoder: Encoder
    record: dict[str, Any]

    @property
    def untuned(self) -> bool:
        """Whether no tuned weights were better on validation, so that the encoder is the public one."""
        return self.record.get("best_step") == 0


def tune(
    tuning: TuneSettings,
    train: TrainData,
    validation: LabelledImages,
    *,
    out: str | Path,
    accelerator: Accelerator | None = None,
    student: Student | None = None,
    extra: dict[str, Any] | None = None,
) -> Tuned:
    """Tune an encoder and write it to ``out`` (see :func:`write_tuned`), with its head if that was trained along.

    An encoder that ``out`` holds already is loaded; a run that was killed is resumed. With several processes all call
    this, and the first one writes.

    Args:
        tuning: what is tuned and how.
        train: images to tune on.
        validation: images that select the weights, disjoint from ``train``.
        out: folder of the result; ``run/`` in it is the folder of :func:`fit`.
        accelerator: from :func:`make_accelerator`; None makes one.
        student: tuned instead of a new one for ``tuning.source``.
        extra: entries added to the record.

    Raises:
        ValueError: ``out`` holds an encoder that was tuned with other settings, or is in use by another run; else as
            :func:`fit` and :func:`build_student`.
    """
    accelerator, folder = accelerator or make_accelerator(), output_folder(out)
    defence = make_defence(tuning.defence, tuning.defence_options)
    identity = _identity(tuning, defence, train, validation)
    # before the claim, which all processes make together: one process alone may load what they tuned
    finished = _load_finished(folder, identity)
    if finished is not None:
        return finished
    with claim_together(folder, accelerator):
        steps = tuning.settings.steps or f"{tuning.settings.epochs} epochs of"
        say(log, "%s: tuning by %s, %s steps", folder, defence.name, steps)
        student = student or make_student(tuning, train, device=accelerator.device)
        result = fit(student, train, validation, defence, tuning.settings, out=folder / RUN, accelerator=accelerator)
        record = _record(identity, result, train, accelerator) | (extra or {})
        if accelerator.is_main_process:
            head = (student.head, train.class_names) if _trains(student.head) else None
            write_tuned(folder, student.encoder, record, head)
        accelerator.wait_for_everyone()
    return Tuned(student.encoder.eval().requires_grad_(False), record)


def _load_finished(folder: Path, identity: dict[str, Any]) -> Tuned | None:
    """The encoder that an earlier run with this identity left in the folder; None where there is none."""
    complete_folder(folder)
    if not (folder / TUNED_RECORD).is_file():
        return None
    record = read_json(folder / TUNED_RECORD)
    ignore = [f"train.{name}" for name in UNIDENTIFYING]
    remedy = "it was tuned with other settings; give another output folder, or delete it"
    check_identity(record.get("identity", {}), identity, folder, ignore=ignore, remedy=remedy)
    log.info("%s is tuned already", folder)
    return Tuned(load_tuned(folder).requires_grad_(False), record)


def make_student(
    tuning: TuneSettings, train: TrainData, *, keep_embeddings: bool = True, device: torch.device | None = None
) -> Student:
    """The student of a tuning: the encoder with its adaptation, and its head.

    Args:
        tuning: what is tuned and how.
        train: names the classes.
        keep_embeddings: store text embeddings in ``tuning.settings.cache_dir``, where there is one.
        device: as of :func:`build_student`.
    """
    head = tuning.head
    if head == "auto" and not is_clip(tuning.source) and not make_defence(tuning.defence).trains_head:
        head = "probe"  # a fresh head that gets no gradient would make validation a coin toss
    return build_student(
        tuning.source,
        train,
        tuning.adaptation,
        head,
        prompts=tuning.prompts,
        lora=tuning.lora,
        seed=tuning.settings.seed,
        cache_dir=tuning.settings.cache_dir if keep_embeddings else None,
        device=device,
    )


def _identity(tuning: TuneSettings, defence: Defence, train: TrainData, validation: LabelledImages) -> dict[str, Any]:
    """What must be the same for a tuned encoder to be the one that is asked for."""
    return {
        "source": tuning.source,
        "adaptation": tuning.adaptation,
        "lora": tuning.lora.to_dict() if tuning.adaptation == "lora" else None,
        "head": tuning.head,
        "prompts": tuning.prompts,
        "defence": {"name": defence.name, **defence.to_dict()},
        "data": {"name": train.name, "n_train": size_of(train), "n_validation": len(validation)},
        "train": tuning.settings.to_dict(),
    }


def _record(identity: dict[str, Any], result: FitResult, train: TrainData, accelerator: Accelerator) -> dict[str, Any]:
    """What is stored beside a tuned encoder."""
    return {
        "role": DEFENCES.get(identity["defence"]["name"]).role,
        "identity": identity,
        "class_names": list(train.class_names),
        "steps": result.steps,
        "best_step": result.best_step,
        "validation": result.validation.to_dict() if result.validation else None,
        "seconds": round(result.seconds, 1),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
