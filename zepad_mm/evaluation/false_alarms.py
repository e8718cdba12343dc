"""False alarms: unattacked images that a detector flags, such as noisy, dark or compressed ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zepad_mm.evaluation.corruptions import OUT_OF_DISTRIBUTION, corrupt
from zepad_mm.evaluation.metrics import FALSE_POSITIVE_RATES, Share, share
from zepad_mm.evaluation.session import Session
from zepad_mm.evaluation.settings import EvalSettings
from zepad_mm.models.detection import SCORES, threshold_at


def false_alarm_stages(settings: EvalSettings) -> list[tuple[str, str, int | None]]:
    """Return (kind, name, severity) of everything that is scored."""
    corrupted = [("corruption", name, level) for name in settings.corruptions for level in settings.severities]
    return [*corrupted, *(("out_of_distribution", name, None) for name in settings.out_of_distribution)]


def false_alarm_rows(session: Session, validation: Tensor) -> list[dict[str, Any]]:
    """Return the share of unattacked images that each suspicion score flags; the clean test images come first.

    Args:
        session: with the clean images scored.
        validation: branch logits (N, v, C) of the clean validation images, which set the thresholds.

    Returns:
        A row for each kind of image and score: ``flagged_at_fpr1`` and ``flagged_at_fpr5`` (share above the threshold
        that 1 % and 5 % of the validation images exceed), the ``accuracy`` of the model as it ships (None where there
        is no right answer), each with its 95 % Wilson interval as ``..._ci``. Empty when the settings name nothing.
    """
    stages = false_alarm_stages(session.settings)
    rows = _rows(session, validation, session.clean.logits, ("clean", "none", None)) if stages else []
    for kind, name, severity in stages:
        rows += _rows(session, validation, _score(session, kind, name, severity), (kind, name, severity))
    return rows


def _score(session: Session, kind: str, name: str, severity: int | None) -> Tensor:
    """Logits (M, n, C) of one kind of image, as a stage that a resumed run need not repeat."""
    level = [] if severity is None else [severity]

    def work() -> dict[str, Tensor]:
        generator = session.generator(kind, name, *level)
        if severity is None:
            images = OUT_OF_DISTRIBUTION.get(name)(session.images, generator)
        else:
            images = corrupt(session.images, name, severity, generator)
        return {"logits": session.score(images)}

    return session.stage(" ".join(map(str, (kind, name, *level))), work)["logits"]


def _rows(
    session: Session, validation: Tensor, logits: Tensor, condition: tuple[str, str, int | None]
) -> list[dict[str, Any]]:
    benign, (kind, name, severity) = session.subject.benign, condition
    branch_logits = session.branch_logits(logits)
    rows = []
    for score_name in SCORES:
        score = SCORES.get(score_name)
        reference, scores = score(validation, benign), score(branch_logits, benign)
        row = {
            "model": session.default.name,
            "kind": kind,
            "name": name,
            "severity": severity,
            "score": score_name,
        }
        for rate in FALSE_POSITIVE_RATES:
            row |= _with_interval(f"flagged_at_fpr{100 * rate:.0f}", share(scores > threshold_at(reference, rate)))
        right = session.default.answer(logits).argmax(-1) == session.labels
        row |= _with_interval("accuracy", None if kind == "out_of_distribution" else share(right))
        rows.append({**row, "n": len(scores)})
    return rows


def _with_interval(name: str, found: Share | None) -> dict[str, Any]:
    value, interval = (None, None) if found is None else (found.value, list(found.interval))
    return {name: value, f"{name}_ci": interval}
