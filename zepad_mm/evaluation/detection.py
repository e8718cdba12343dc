"""Detection: how well each suspicion score separates attacked from clean images; thresholds from validation images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from zepad_mm.evaluation.metrics import detect, paper_rule_accuracy
from zepad_mm.evaluation.session import Session
from zepad_mm.evaluation.threats import T2, T3, UNIVERSAL
from zepad_mm.models.detection import SCORES, threshold_at

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
    wrong = {example.key: _wrong(session, session.branch_logits(example.logits)) for example in attacked}
    rows = []
    for name in SCORES:
        score = SCORES.get(name)
        clean = [score(logits, benign) for logits in (validation, session.branch_logits(session.clean.logits))]
        scores = {example.key: score(session.branch_logits(example.logits), benign) for example in attacked}
        found = [(e.threat, e.attack, scores[e.key], wrong[e.key]) for e in attacked if e.threat in UNIVERSAL]
        for threat, shown in ((T2, (FIRST, WORST)), (T3, (WORST,))):
            keys = [example.key for example in attacked if example.threat in threat.counts]
            if any(example.threat == threat.key for example in attacked):
                for attack in shown:
                    successes = [scores[key] for key in keys], [wrong[key] for key in keys]
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
