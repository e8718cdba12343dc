"""Evaluation under threat models: attacks on shared images, per-sample records, diagnostics, reports.

engine.py      evaluate(): models x tasks -> report          threats.py     what each attacker knows
subjects.py    any model as networks and rows                settings.py    budgets, strengths, presets
universal.py   T1, T1p, T1b                                  white_box.py   T2, T3
session.py     one evaluation in progress                    stage_cache.py its finished stages on disk
detection.py   suspicion scores under attack                 false_alarms.py, corruptions.py: without an attack
diagnostics.py was the attack too weak?                      metrics.py     shares, intervals, ASR, AUROC
records.py     answers per image -> rows                     report.py, report_text.py: report.json, report.md
tables.py      several reports in one table                  plots.py, model_card.py, publishing.py
"""

from zepad_mm.evaluation.data import EvalData
from zepad_mm.evaluation.engine import evaluate
from zepad_mm.evaluation.publishing import fetch_report, push_report
from zepad_mm.evaluation.records import Records
from zepad_mm.evaluation.report import Report, acceptance
from zepad_mm.evaluation.settings import PRESETS, EvalSettings
from zepad_mm.evaluation.stage_cache import read_stage
from zepad_mm.evaluation.subjects import Row, RowKind, Subject, subject_of
from zepad_mm.evaluation.threats import THREATS, ThreatModel

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
    "fetch_report",
    "push_report",
    "read_stage",
    "subject_of",
]
