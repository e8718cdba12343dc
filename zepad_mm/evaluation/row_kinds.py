"""What the rows of a report are; imports nothing heavy, so that reports are read and shown at once."""

from __future__ import annotations

from enum import StrEnum

WORST = "worst"  # name of the attack in rows of the per-sample worst case


class RowKind(StrEnum):
    """What a row of the table is, in the order in which tables show them."""

    UNDEFENDED = "undefended"  # the public encoder with its own head
    DEFAULT = "default"  # the model as it ships
    BRANCH = "branch"  # one branch alone
    BASELINE = "baseline"  # a model for comparison
    RULE = "rule"  # the branches under another fusion rule
