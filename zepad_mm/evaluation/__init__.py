"""Evaluation that doubts itself: threat models, shared example pools, per-sample records, diagnostics, a report."""

from zepad_mm.evaluation.context import read_stage
from zepad_mm.evaluation.data import EvalData
from zepad_mm.evaluation.engine import evaluate
from zepad_mm.evaluation.publishing import fetch_report, push_report
from zepad_mm.evaluation.records import Records
from zepad_mm.evaluation.report import Report, acceptance
from zepad_mm.evaluation.settings import PRESETS, THREATS, EvalSettings

__all__ = [
    "PRESETS",
    "THREATS",
    "EvalData",
    "EvalSettings",
    "Records",
    "Report",
    "acceptance",
    "evaluate",
    "fetch_report",
    "push_report",
    "read_stage",
]
