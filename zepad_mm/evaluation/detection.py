"""Detection: how well each suspicion score separates attacked from clean images, and its false alarms.

A false alarm is an unattacked image that is flagged, such as a noisy, dark or compressed one. Thresholds come from
clean validation images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from zepad_mm.data.corruptions import OUT_OF_DISTRIBUTION, corrupt
from zepad_mm.evaluation.metrics import FALSE_POSITIVE_RATES, Share, detect, paper_rule_accuracy, share
from zepad_mm.evaluation.session import Session
from zepad_mm.evaluation.settings import EvalSettings
from zepad_mm.evaluation.threats import T1I, T1IB, T2, T3, THREATS, UNIVERSAL
from zepad_mm.models.detection import SCORES, score_names, threshold_at

FIRST, WORST = "first_success", "worst"  # which successful example of an image is shown


def score_validation(session: Session) -> Tensor:
    """Return branch logits (N, v, C) of the clean validation images."""
    images = session.data.validation.images
    return session.stage("validation", lambda: {"logits": session.branch_logits(session.score(images))})["logits"]


def deployed_threshold(session: Session, validation: Tensor) -> float:
    """Return the model's own threshold or, where it has none, that of its false-positive rate on these images."""
    detector = session.subject.detector
    assert detector is not None
    if detector.threshold is not None:
        return detector.threshold
    return threshold_at(session.fusion(validation).score, detector.false_positive_rate)


def detection_rows(session: Session, validation: Tensor) -> list[dict[str, Any]]:
    """Return the detection rows of report.json.

    Universal threat models hold each attack on all images. T2 and T3 hold the images for which some attack found a
    wrong answer: ``first_success`` shows the first one, found without regard to the detector; ``worst`` shows, for
    each image, the least suspicious one, which with T3's attacks is the adaptive result.
    """
    benign = session.subject.benign
    attacked = [example for example in session.examples[1:] if not example.control]
    wrong = {
        example.key: _wrong(session, session.branch_logits(example.logits))[: session.count(THREATS[example.threat])]
        for example in attacked
    }
    rows = []
    for name in score_names(session.gate is not None):
        score = SCORES.get(name)
        clean = [score(logits, benign) for logits in (validation, session.branch_logits(session.clean.logits))]
        scores = {example.key: score(session.branch_logits(example.logits), benign) for example in attacked}
        found = [
            (e.threat, e.attack, scores[e.key][: len(wrong[e.key])], wrong[e.key])
            for e in attacked
            if e.threat in (*UNIVERSAL, T1I.key, T1IB.key)
        ]
        for threat, shown in ((T2, (FIRST, WORST)), (T3, (WORST,))):
            keys = [example.key for example in attacked if example.threat in threat.counts]
            if any(example.threat == threat.key for example in attacked):
                for attack in shown:
                    successes = [scores[key][: session.count(threat)] for key in keys], [wrong[key] for key in keys]
                    chosen = _one_success_per_image(*successes, least_suspicious=attack == WORST)
                    found.append((threat.key, attack, chosen, torch.ones_like(chosen, dtype=torch.bool)))
        rows += [_row(session, name, *group, clean) for group in found if len(group[2])]
    return rows


def _row(
    session: Session, score: str, threat: str, attack: str, scores: Tensor, wrong: Tensor, clean: Sequence[Tensor]
) -> dict[str, Any]:
    """One row from the scores (m,) of attacked images and those of clean validation and clean test images."""
    successful = detect(clean[0], clean[1], scores[wrong]).auroc if bool(wrong.any()) else None
    return {
        "model": session.default.name,
        "score": score,
        "threat": threat,
        "attack": attack,
        **asdict(detect(clean[0], clean[1], scores)),
        "accuracy_paper_rule": paper_rule_accuracy(clean[1], scores) if score == "confidence_gap" else None,
        "n": len(scores),
        "auroc_successful": successful,
        "n_successful": int(wrong.sum()),
        "adaptive": threat == T3.key,
    }


def _wrong(session: Session, branch_logits: Tensor) -> Tensor:
    return session.fusion(branch_logits).logits.argmax(-1) != session.labels


def _one_success_per_image(scores: Sequence[Tensor], wrong: Sequence[Tensor], *, least_suspicious: bool) -> Tensor:
    """(k,) score of one successful example of each image that has any: the lowest, or that of the first attack."""
    best = torch.full_like(scores[0], torch.inf)
    for score, mask in zip(scores, wrong, strict=True):
        take = mask & (score < best) if least_suspicious else mask & best.isinf()
        best = torch.where(take, score, best)
    return best[best.isfinite()]


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
    rows = _false_alarm_rows(session, validation, session.clean.logits, ("clean", "none", None)) if stages else []
    for kind, name, severity in stages:
        rows += _false_alarm_rows(
            session, validation, _score_unattacked(session, kind, name, severity), (kind, name, severity)
        )
    return rows


def _score_unattacked(session: Session, kind: str, name: str, severity: int | None) -> Tensor:
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


def _false_alarm_rows(
    session: Session, validation: Tensor, logits: Tensor, condition: tuple[str, str, int | None]
) -> list[dict[str, Any]]:
    benign, (kind, name, severity) = session.subject.benign, condition
    branch_logits = session.branch_logits(logits)
    rows = []
    for score_name in score_names(session.gate is not None):
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
