"""The evaluation engine: models x tasks -> one report.

``evaluate(model, data=...)`` evaluates one model on one data set. ``evaluate(models={...}, tasks={...})`` is a study:
every model on every task, with one report over all of them.

A **model** is a ``ZePAD``; a source string ("embedded", a folder, a Hub name, or a CLIP such as "open_clip:embedded"
with zero-shot heads from the class names); a ``Branch``; a pair ``(encoder, head)``; any ``nn.Module`` from images in
[0, 1] to logits; a :class:`~zepad_mm.evaluation.subjects.Subject`, for rows of one's own over shared networks; or, in a
study, a function ``(task name, EvalData) -> any of these``, for heads that are trained for each task.

A **task** is a data set by name or folder, or an ``EvalData`` (test, validation and surrogate images with class names).

What runs follows from the model: without a public encoder there is no T1 and T1p, without branches no T1b, without a
fusion no T3 and no detection. A plain classifier gets clean and T2.

In a study each pair has the folder ``out/MODEL/TASK`` with a report and a cache of its own: a killed study continues
there, and finished pairs are read. Universal perturbations made by the same attack on the same encoders and surrogate
images are crafted once and kept in ``out/perturbations``: give the tasks the same ``surrogate`` images to share them.
Row names in the study's report are ``MODEL`` for the model as it ships and ``MODEL/ROW`` for its other rows, the data
set of a row is the name of the task; ``kind`` says what a row is, ``algorithm`` and ``target`` what attacked it.

Example, two rows over three networks, attacked once for both::

    subject = subject_of(model)                                        # rows of a ZePAD
    subject = subject.with_fused_row("robust_only", ["branch:a", "branch:b"], "equal")
    evaluate(models={"ours": subject, "plain": lambda task, data: (encoder, heads[task])}, tasks={"cars": "cars"},
             settings="demo", threats=("clean", "T1", "T2"), out="outputs/study", resume=True)

What each threat model means is in ``threats.py``; its attacks are in ``universal.py`` (T1, T1p, T1b) and
``white_box.py`` (T2, T3).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from zepad_mm.attacks import frozen, published_variants
from zepad_mm.data import load_class_names, load_templates
from zepad_mm.data.loading import hub_name
from zepad_mm.evaluation.data import EvalData
from zepad_mm.evaluation.detection import (
    deployed_threshold,
    detection_rows,
    false_alarm_rows,
    false_alarm_stages,
    score_validation,
)
from zepad_mm.evaluation.diagnostics import Check, run_checks, verdicts
from zepad_mm.evaluation.records import Records
from zepad_mm.evaluation.report import JSON, OVERESTIMATED, Report, merged
from zepad_mm.evaluation.session import PerturbationStore, Session
from zepad_mm.evaluation.settings import PRESETS, EvalSettings
from zepad_mm.evaluation.subjects import BranchView, load_model, resize_of, subject_of
from zepad_mm.evaluation.threats import CLEAN, T1, T1B, T1I, T1IB, T1P, T2, T3, THREATS, RowKind
from zepad_mm.evaluation.transfer import (
    count_branch_transfer,
    count_public_transfer,
    run_branch_transfer,
    run_public_transfer,
)
from zepad_mm.evaluation.universal import (
    count_family,
    count_patches,
    count_public,
    run_clean,
    run_family_universal,
    run_patches,
    run_public_universal,
)
from zepad_mm.evaluation.white_box import (
    certified_accuracy,
    count_detector_aware,
    count_white_box,
    run_detector_aware,
    run_white_box,
)
from zepad_mm.utils.atomic import complete_folder, replacing_folder
from zepad_mm.utils.distributed import Processes, claim_together
from zepad_mm.utils.images import Resize
from zepad_mm.utils.locks import output_folder
from zepad_mm.utils.provenance import provenance

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stages:
    """What runs for a threat model, and how many stages that is."""

    run: Callable[[Session], None]
    count: Callable[[Session], int]


# key of a threat model -> its attacks, in the order in which they run
STAGES = {
    T1.key: Stages(run_public_universal, count_public),
    T1P.key: Stages(run_patches, count_patches),
    T1B.key: Stages(run_family_universal, count_family),
    T1I.key: Stages(run_public_transfer, count_public_transfer),
    T1IB.key: Stages(run_branch_transfer, count_branch_transfer),
    T2.key: Stages(run_white_box, count_white_box),
    T3.key: Stages(run_detector_aware, count_detector_aware),
}


def evaluate(
    model: Any = None,
    *,
    data: str | EvalData = "embedded",
    models: Mapping[str, Any] | None = None,
    tasks: Mapping[str, str | EvalData] | None = None,
    settings: EvalSettings | str = "demo",
    threats: str | Sequence[str] | None = None,
    epsilon: float | None = None,
    n: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    baselines: Mapping[str, nn.Module] | None = None,
    accelerator: Accelerator | None = None,
) -> Report:
    """Evaluate a model, or several models on several tasks, under the threat models.

    A defended model is compared with the undefended one, its own branches and every other fusion rule.

    Args:
        model: see above; a source string is pointed at the class names of the data.
        data: a data set by name or folder, or the images themselves.
        models: name -> model, in the place of ``model``: a study.
        tasks: name -> data set, in the place of ``data``.
        settings: a preset ("smoke", "demo": minutes on two CPU cores; "full"), or settings of your own.
        threats: keys of ``THREATS``; overrides the settings, as the next three do.
        epsilon: budget of T2 and T3, in pixels of [0, 1] and in the norm of the settings.
        n: number of test images.
        seed: of everything random.
        out: folder for ``report.json``, ``report.md``, ``records.parquet``, ``perturbations/`` and ``cache/``.
        resume: continue an earlier run in ``out`` that was killed; at most one batch (or one crafting) is repeated.
        baselines: further models for comparison, each from images in [0, 1] to logits; listed as ``baseline:<name>``.
        accelerator: whose processes all call this, see ``out``, and share the batches of attacks and answers: the table
            is that of one process. A model given by name is put on its device. None: this process alone.

    Raises:
        ValueError: unknown threat model, budget out of range, classes that do not match, a cache of another run, or a
            folder in use by one.
        FileNotFoundError: no such model or data.
    """
    if (model is None) == (models is None):
        raise ValueError("evaluate: expected either a model or models={name: model}, and not both")
    settings = PRESETS.get(settings) if isinstance(settings, str) else settings
    changes: dict[str, Any] = {"epsilon": epsilon, "n": n, "seed": seed}
    changes["threats"] = None if threats is None else (threats,) if isinstance(threats, str) else tuple(threats)
    settings = replace(settings, **{key: value for key, value in changes.items() if value is not None})
    run = _Run(settings, resume, baselines or {}, accelerator)
    folder = None if out is None else output_folder(out)
    if models is None and tasks is None:
        return run.one(model, data, folder)
    with nullcontext() if folder is None else claim_together(folder, accelerator):
        return run.study({"model": model} if models is None else models, tasks or {_task_name(data): data}, folder)


@dataclass(frozen=True)
class _Run:
    """What all evaluations of one call have in common."""

    settings: EvalSettings
    resume: bool
    baselines: Mapping[str, nn.Module]
    accelerator: Accelerator | None

    @property
    def processes(self) -> Processes:
        return Processes.of(self.accelerator)

    def study(self, models: Mapping[str, Any], tasks: Mapping[str, str | EvalData], out: Path | None) -> Report:
        """Every model on every task."""
        started = time.perf_counter()
        store = PerturbationStore(None if out is None else out / "perturbations")
        found: dict[tuple[str, str], Report] = {}
        for task, source in tasks.items():
            loaded: dict[Resize | None, EvalData] = {}  # most models want the same images
            for name, model in models.items():
                log.info("%s on %s", name, task)
                folder = None if out is None else out / _folder_name(name) / _folder_name(task)
                data, built = source, model
                if callable(model) and not isinstance(model, nn.Module):
                    data = self._load(source, None, loaded)
                    built = model(task, data)
                found[name, task] = self.one(built, data, folder, store, keep_finished=True, loaded=loaded)
        meta = provenance(seed=self.settings.seed, config={"evaluation": self.settings.to_dict()})
        report = merged(found, {**meta, "wall_s": round(time.perf_counter() - started, 2)})
        if out is not None and self.processes.first:
            report.save(out)
        return report

    def one(
        self,
        model: Any,
        data: str | EvalData,
        out: Path | None,
        store: PerturbationStore | None = None,
        keep_finished: bool = False,
        loaded: dict[Resize | None, EvalData] | None = None,
    ) -> Report:
        """One model on one task; with ``keep_finished`` and ``resume``, a report that is there already is read."""
        if out is None:
            return self._one(model, data, out, store, keep_finished, loaded)
        with claim_together(out, self.accelerator):
            return self._one(model, data, out, store, keep_finished, loaded)

    def _one(
        self,
        model: Any,
        data: str | EvalData,
        out: Path | None,
        store: PerturbationStore | None,
        keep_finished: bool,
        loaded: dict[Resize | None, EvalData] | None,
    ) -> Report:
        started, processes = time.perf_counter(), self.processes
        source = str(model) if isinstance(model, str | Path) else ""
        names, prompts = self._class_names(data)
        model = self._model(model, names, prompts)
        images = self._load(data, resize_of(model), {} if loaded is None else loaded)
        policy, rules = self.settings.policy, self.settings.rules
        subject = subject_of(model, class_names=names, rules=rules, baselines=self.baselines, policy=policy)
        images.check(subject.class_names)
        for path in self.settings.published:  # a file that cannot be used is named before anything runs
            published_variants(path, epsilon=self.settings.epsilon_universal, image_size=images.test.images.shape[-1])
        with torch.inference_mode(False):
            session = Session(subject, images, self.settings, out, self.resume, processes, store)
            if out is not None and keep_finished and self.resume and _is_finished(out):
                session.finish()
                log.info("finished already: %s", out / JSON)
                return Report.load(out)
            with frozen(BranchView(list(session.members.values()))):
                findings = _run_stages(session)
        described = {"model": dict(subject.about), "source": source, "data": images.test.name}
        if isinstance(data, str) and (on_hub := hub_name(data)):
            described["hub_data"] = on_hub
        if images.origin:
            described["images"] = dict(images.origin)
        meta = provenance(seed=self.settings.seed, config={"evaluation": self.settings.to_dict(), **described})
        meta["wall_s"] = round(time.perf_counter() - started, 2)
        report = findings.report(meta)
        if out is not None and processes.first:
            with replacing_folder(out) as staged:
                findings.records.save(staged)
                report.save(staged)
        for warning in report.meta["warnings"] if processes.first else ():
            log.warning(warning)
        return report

    def _class_names(self, data: str | EvalData) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """The class names of the data, and its prompt templates where it comes with some."""
        if isinstance(data, str):
            return load_class_names(data, self.settings.test_split), load_templates(data)
        return data.test.class_names, data.prompts

    def _load(self, data: str | EvalData, resize: Resize | None, loaded: dict[Resize | None, EvalData]) -> EvalData:
        if not isinstance(data, str):
            return data.limited(self.settings)
        if resize not in loaded:
            loaded[resize] = EvalData.load(data, self.settings, resize)
        return loaded[resize]

    def _model(self, model: Any, names: tuple[str, ...], prompts: tuple[str, ...] | None) -> Any:
        """The model, loaded where it is given by name."""
        if not isinstance(model, str | Path):
            return model
        model = load_model(model, names, prompts)
        if self.accelerator is not None:
            for module in model if isinstance(model, tuple) else (model,):
                module.to(self.accelerator.device)
        return model


@dataclass(frozen=True)
class _Findings:
    """What the stages of one session found."""

    records: Records
    detection: list[dict[str, Any]]
    false_alarms: list[dict[str, Any]]
    checks: list[Check]
    certificate: dict[str, float] | None
    not_applicable: dict[str, str]

    def report(self, meta: dict[str, Any]) -> Report:
        """The report, with a warning for each failed check."""
        meta["certificate"] = self.certificate
        meta["false_alarms"] = self.false_alarms
        meta["diagnostics"] = [check.to_dict() for check in self.checks]
        if self.not_applicable:
            meta["not_applicable"] = self.not_applicable
        warnings = [f"{OVERESTIMATED} ({check.name}): {check.detail}" for check in self.checks if not check.passed]
        return Report(meta={**meta, "warnings": warnings}, rows=self.records.rows(), detection=self.detection)


def _run_stages(session: Session) -> _Findings:
    not_applicable = _not_applicable(session)
    chosen = [key for key in STAGES if key in session.settings.threats and key not in not_applicable]
    for key, reason in not_applicable.items():
        log.warning("%s does not apply to this model: %s", key, reason)
    has_detector = session.subject.fusion is not None
    run_clean(session)
    # members that are one network are known now, so that the stages can be counted
    session.bar.total = 1 + has_detector + _count_stages(session, chosen)
    log.info(
        "%d images of %s, %d rows, threat models %s, %d stages on %s",
        len(session.labels),
        session.data.test.name,
        len(session.rows),
        ", ".join([CLEAN.key, *chosen]),
        session.bar.total,
        session.device,
    )
    validation = Tensor()
    if has_detector:
        validation = score_validation(session)
        session.threshold = deployed_threshold(session, validation)
    for key in chosen:
        STAGES[key].run(session)
    false_alarms = false_alarm_rows(session, validation) if has_detector else []
    records = Records.of(session)
    checks = run_checks(session, records)
    records = replace(records, verdicts=verdicts(session, checks))
    session.finish()
    detection = detection_rows(session, validation) if has_detector else []
    return _Findings(records, detection, false_alarms, checks, certified_accuracy(session), not_applicable)


def _count_stages(session: Session, chosen: Sequence[str]) -> int:
    """Number of stages after the clean one and that of the validation images."""
    stages = sum(STAGES[key].count(session) for key in chosen)
    if T2.key in chosen:  # which also scores every perturbation of T1 and T1b at its own budget
        perturbations = [count_public(session) - 1] * (T1.key in chosen) + [count_family(session)] * (T1B.key in chosen)
        stages += sum(perturbations)
    return stages + len(false_alarm_stages(session.settings)) * (session.subject.fusion is not None)


def _not_applicable(session: Session) -> dict[str, str]:
    """Key of each threat model that the settings ask for and the model lacks something for -> what that is."""
    subject = session.subject
    available = {
        "": True,
        "public encoder": subject.public_encoder is not None,
        "undefended model": any(row.kind is RowKind.UNDEFENDED for row in session.rows)
        or (subject.public_encoder is not None and subject.fusion is None),
        "branches": bool(session.branch_rows),
        "detector": subject.fusion is not None,
    }
    wanted = [THREATS[key] for key in session.settings.threats]
    return {threat.key: f"it has no {threat.needs}" for threat in wanted if not available[threat.needs]}


def _is_finished(out: Path) -> bool:
    complete_folder(out)
    return (out / JSON).is_file()


def _task_name(data: str | EvalData) -> str:
    return Path(data).name if isinstance(data, str) else data.test.name


def _folder_name(name: str) -> str:
    """A name as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-") or "model"
