"""``evaluate``: run the threat models, doubt the outcome, write the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from zepad_mm.attacks import frozen
from zepad_mm.attacks.objective import input_gradient
from zepad_mm.evaluation.certificate import certified_shares
from zepad_mm.evaluation.context import Session, Through
from zepad_mm.evaluation.data import EvalData
from zepad_mm.evaluation.detection import deployed_threshold, detection_rows, score_validation
from zepad_mm.evaluation.diagnostics import Check, run_checks
from zepad_mm.evaluation.false_alarms import false_alarm_rows, false_alarm_stages
from zepad_mm.evaluation.records import Records
from zepad_mm.evaluation.report import Report, acceptance
from zepad_mm.evaluation.settings import PRESETS, EvalSettings
from zepad_mm.evaluation.universal import (
    run_clean,
    run_patches,
    run_universal,
    universal_attack,
    universal_targets,
)
from zepad_mm.evaluation.white_box import run_detector_aware, run_white_box
from zepad_mm.models.zepad import ZePAD
from zepad_mm.utils.distributed import Processes
from zepad_mm.utils.provenance import provenance

log = logging.getLogger(__name__)


def evaluate(
    model: ZePAD | str,
    *,
    data: str | EvalData = "embedded",
    settings: EvalSettings | str = "demo",
    threats: Sequence[str] | None = None,
    epsilon: float | None = None,
    n: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    baselines: Mapping[str, nn.Module] | None = None,
    accelerator: Accelerator | None = None,
) -> Report:
    """Judge a defended model against the undefended one, its own branches and every other fusion rule.

    Args:
        model: the defence, or a name for ``ZePAD.from_pretrained``; a named one is pointed at the data's classes.
        data: a data set by name or folder, or the pictures themselves.
        settings: a preset ("demo": minutes on two CPU cores; "full") or settings of your own.
        threats: of clean, T1, T1p, T1b, T2, T3; overrides the settings, as the next three do.
        epsilon: budget of T2 and T3, in pixels of [0, 1] and in the norm of the settings.
        n: number of test pictures.
        seed: of everything random.
        out: folder for ``report.json``, ``report.md``, ``records.parquet``, ``perturbations/`` and ``cache/``.
        resume: take up an earlier run in ``out`` that was cut off; at most one batch (or one crafting) is done again.
        baselines: further models for comparison, each from images in [0, 1] to logits; listed as ``baseline:<name>``.
        accelerator: whose processes all call this, see ``out``, and share the batches of attacks and answers: the table
            is that of one process. A model given by name is put on its device. None: this process alone.

    Raises:
        ValueError: unknown threat, budget out of range, classes that do not match, a cache of another run.
        FileNotFoundError: no such model or data.
    """
    started = time.perf_counter()
    settings = PRESETS.get(settings) if isinstance(settings, str) else settings
    changes: dict[str, Any] = {"epsilon": epsilon, "n": n, "seed": seed}
    changes["threats"] = None if threats is None else (threats,) if isinstance(threats, str) else tuple(threats)
    settings = replace(settings, **{key: value for key, value in changes.items() if value is not None})
    pictures = EvalData.load(data, settings) if isinstance(data, str) else data.limited(settings)
    source = str(model) if isinstance(model, str) else ""
    if isinstance(model, str):
        model = ZePAD.from_pretrained(model)
        if all(branch.head == "zero_shot" for branch in model.config.branches):
            model.set_classes(pictures.test.class_names)
        if accelerator is not None:
            model.to(accelerator.device)
    pictures.check(model.class_names)
    folder = None if out is None else Path(out)
    processes = Processes(accelerator.process_index, accelerator.num_processes) if accelerator else Processes()
    with torch.inference_mode(False):
        session = Session(model, pictures, settings, baselines or {}, folder, resume, processes)
        with frozen(Through(list(session.members.values()), None)):
            records, detection, alarms, checks = _run(session)
            certificate = certified_shares(session)
    described = {"model": model.config.to_dict(), "source": source, "data": pictures.test.name}
    meta = provenance(seed=settings.seed, config={"evaluation": settings.to_dict(), **described})
    meta["wall_s"] = round(time.perf_counter() - started, 2)
    meta["certificate"] = certificate
    meta["false_alarms"] = alarms
    meta["diagnostics"] = [check.to_dict() for check in checks]
    doubts = [f"likely overestimated ({check.name}): {check.detail}" for check in checks if not check.passed]
    report = Report(meta={**meta, "warnings": doubts}, rows=records.rows(), detection=detection)
    report.meta["warnings"] += [f"acceptance: {failure}" for failure in acceptance(report)]
    if folder is not None and processes.first:
        records.save(folder)
        report.save(folder)
    for warning in report.meta["warnings"] if processes.first else ():
        log.warning(warning)
    return report


def _run(session: Session) -> tuple[Records, list[dict[str, Any]], list[dict[str, Any]], list[Check]]:
    threats = session.settings.threats
    _announce(session)
    run_clean(session)
    validation = score_validation(session)
    threshold = deployed_threshold(session, validation)
    if "T1" in threats:
        run_universal(session, "T1")
    if "T1p" in threats:
        run_patches(session)
    if "T1b" in threats:
        run_universal(session, "T1b")
    if "T2" in threats:
        run_white_box(session)
    if "T3" in threats:
        run_detector_aware(session, threshold)
    alarms = false_alarm_rows(session, validation)
    records = Records.of(session, threshold)
    checks = run_checks(session, records)
    session.finish()
    return records, detection_rows(session, validation), alarms, checks


def _announce(session: Session) -> None:
    """Log what is to come and about how long it takes, from one batch through every member; size the bar."""
    settings, n = session.settings, len(session.labels)
    size = min(settings.batch_size, n)
    forward = backward = 0.0
    for member in session.members.values():
        images = session.images[:size].to(session.device)
        with torch.no_grad():
            member(images)
        images.requires_grad_()
        began = time.perf_counter()
        outputs = member(images)
        middle = time.perf_counter()
        input_gradient(outputs, images)
        forward += (middle - began) / size
        backward += (time.perf_counter() - began) / size
    per_member = backward / len(session.members)
    stages, seconds = 2, forward * (n + len(session.data.validation))
    made = {"T1": settings.universal, "T1p": settings.patches, "T1b": settings.universal_family}
    for threat, names in made.items():
        if threat in settings.threats:
            targets = universal_targets(session, threat)
            stages += len(names) * len(targets) + (threat != "T1b") + len(settings.published) * (threat == "T1")
            crafting = [universal_attack(session, threat, name) for name in names]
            pictures = sum(attack.steps * min(attack.batch_size, len(session.data.surrogate)) for attack in crafting)
            networks = len(targets) - 1 + len(session.branch_rows) if "family" in targets else len(targets)
            seconds += pictures * networks * per_member + forward * n * len(names) * len(targets)
    if "T2" in settings.threats:
        branches, fused = len(session.branch_rows), len(session.fused_rows)
        together = len(set(settings.pools) - {"branch"})
        passes = branches * (("branch" in settings.pools) + 0.7 * together)  # the pool
        passes += fused * branches * 0.2 * settings.restarts * len(settings.own_attacks)  # what survived it
        seconds += n * settings.steps * passes * per_member
        passes += branches * 0.4 * settings.restarts * len(settings.adaptive)
        stages += branches * ("branch" in settings.pools) + together + len(session.rows) * len(settings.own_attacks)
        stages += len(settings.adaptive)
    if "T3" in settings.threats:
        seconds += len(settings.evasion) * n * settings.detector_steps * len(session.branch_rows) * per_member * 0.5
        stages += len(settings.evasion)
    unattacked = len(false_alarm_stages(settings))
    stages, seconds = stages + unattacked, seconds + forward * n * unattacked
    session.bar.total = stages
    log.info(
        "%d pictures of %s, threats %s, %d models: about %.0f s on %s",
        n,
        session.data.test.name,
        ", ".join(settings.threats),
        len(session.rows),
        seconds,
        session.device,
    )
