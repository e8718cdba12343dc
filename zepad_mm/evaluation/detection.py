"""How well each detection score tells the attacked pictures from the clean ones; thresholds from validation only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from zepad_mm.evaluation.context import Session
from zepad_mm.evaluation.metrics import detect, paper_rule_accuracy
from zepad_mm.models.detection import SCORES, threshold_at


def score_validation(session: Session) -> Tensor:
    """Branch logits (N, v, C) of the clean validation pictures."""
    images = session.data.validation.images
    branches = list(session.default.members)
    return session.stage("validation", lambda: {"logits": session.score(images)[branches]})["logits"]


def deployed_threshold(session: Session, validation: Tensor) -> float:
    """The model's own threshold; where it has none, the one its false-positive rate gives on these pictures."""
    config = session.model.config.detector
    if config.threshold is not None:
        return config.threshold
    return threshold_at(session.model.fusion(validation).score, config.false_positive_rate)


def detection_rows(session: Session, validation: Tensor) -> list[dict[str, Any]]:
    """The detection rows of report.json.

    T1, T1p and T1b hold each attack on all pictures. T2 and T3 hold the pictures for which some attack found a wrong
    answer: ``first_success`` shows the first that did, made without a thought of the detector; ``worst`` shows, for
    each picture, the least suspicious of them, and with T3's attacks among them that is the adaptive figure.
    """
    model, branches = session.model, list(session.default.members)
    attacked = [example for example in session.examples[1:] if not example.control]
    wrong = {example.key: _wrong(session, example.logits[branches]) for example in attacked}
    rows = []
    for name in SCORES:
        score = SCORES.get(name)
        calm = [score(logits, model.benign) for logits in (validation, session.clean.logits[branches])]
        scores = {example.key: score(example.logits[branches], model.benign) for example in attacked}
        found = [
            (e.threat, e.attack, scores[e.key], wrong[e.key]) for e in attacked if e.threat in ("T1", "T1p", "T1b")
        ]
        for threat, included in (("T2", ("T2",)), ("T3", ("T2", "T3"))):
            keys = [example.key for example in attacked if example.threat in included]
            if any(example.threat == threat for example in attacked):
                for attack in ("first_success", "worst") if threat == "T2" else ("worst",):
                    chosen = _successes([scores[key] for key in keys], [wrong[key] for key in keys], attack == "worst")
                    found.append((threat, attack, chosen, torch.ones_like(chosen, dtype=torch.bool)))
        rows += [_row(name, *group, calm) for group in found if len(group[2])]
    return rows


def _row(name: str, threat: str, attack: str, scores: Tensor, wrong: Tensor, calm: Sequence[Tensor]) -> dict[str, Any]:
    """One row from the scores (m,) of attacked pictures and those of clean validation and clean test pictures."""
    successful = detect(calm[0], calm[1], scores[wrong]).auroc if bool(wrong.any()) else None
    return {
        "model": "zepad",
        "score": name,
        "threat": threat,
        "attack": attack,
        **asdict(detect(calm[0], calm[1], scores)),
        "accuracy_paper_rule": paper_rule_accuracy(calm[1], scores) if name == "confidence_gap" else None,
        "n": len(scores),
        "auroc_successful": successful,
        "n_successful": int(wrong.sum()),
        "adaptive": threat == "T3",
    }


def _wrong(session: Session, branch_logits: Tensor) -> Tensor:
    return session.model.fusion(branch_logits).logits.argmax(-1) != session.labels


def _successes(scores: Sequence[Tensor], wrong: Sequence[Tensor], least_suspicious: bool) -> Tensor:
    """(k,) score of one successful example of each picture that has any: the lowest, or that of the first attack."""
    best = torch.full_like(scores[0], torch.inf)
    for score, mask in zip(scores, wrong, strict=True):
        take = mask & (score < best) if least_suspicious else mask & best.isinf()
        best = torch.where(take, score, best)
    return best[best.isfinite()]
