"""Evaluation under threat models: attacks on shared images, per-sample records, diagnostics, reports.

Where to find what::

    engine.py        evaluate(): models x tasks -> report
    suites.py        evaluate_suite(): named collections of data sets at several budgets
    threats.py       threat models: what each attacker knows, which examples count
    subjects.py      any model as networks and rows
    settings.py      budgets, strengths of attacks, presets
    universal.py     T1, T1p and T1b: one perturbation for all images
    white_box.py     T2 and T3: each image is attacked
    session.py       one evaluation in progress; stage_cache.py keeps its finished stages
    detection.py     suspicion scores (models/detection.py) under attack and on unattacked images (data/corruptions.py)
    diagnostics.py   whether the attacks were too weak
    metrics.py       shares with intervals, attack success rates, AUROC
    records.py       answers per image, and the rows that follow from them
    report.py        report.json; report_text.py writes report.md
    tables.py        several reports in one table
    plots.py, model_card.py, publishing.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zepad_mm.utils.lazy import lazy_attributes

if TYPE_CHECKING:
    from zepad_mm.evaluation.data import EvalData
    from zepad_mm.evaluation.engine import evaluate
    from zepad_mm.evaluation.publishing import fetch_report, push_report
    from zepad_mm.evaluation.records import Records
    from zepad_mm.evaluation.report import Report, acceptance
    from zepad_mm.evaluation.settings import PRESETS, EvalSettings
    from zepad_mm.evaluation.stage_cache import read_stage
    from zepad_mm.evaluation.subjects import Row, RowKind, Subject, subject_of
    from zepad_mm.evaluation.suites import evaluate_suite
    from zepad_mm.evaluation.threats import THREATS, ThreatModel

_HOMES = {
    "EvalData": "data",
    "EvalSettings": "settings",
    "PRESETS": "settings",
    "Records": "records",
    "Report": "report",
    "Row": "subjects",
    "RowKind": "subjects",
    "Subject": "subjects",
    "THREATS": "threats",
    "ThreatModel": "threats",
    "acceptance": "report",
    "evaluate": "engine",
    "evaluate_suite": "suites",
    "fetch_report": "publishing",
    "push_report": "publishing",
    "read_stage": "stage_cache",
    "subject_of": "subjects",
}

__all__ = [
    "PRESETS",
    "THREATS",
    "EvalData",
    "EvalSettings",
    "Records",
    "Report",
    "Row",
    "RowKind",
    "Subject",
    "ThreatModel",
    "acceptance",
    "evaluate",
    "evaluate_suite",
    "fetch_report",
    "push_report",
    "read_stage",
    "subject_of",
]

__getattr__ = lazy_attributes(__name__, _HOMES)
