"""How well each detection score tells the attacked pictures from the clean ones; thresholds from validation only."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from zepad_mm.detection import PAPER_GAP, SCORES, threshold_at
from zepad_mm.evaluation.metrics import detect, paper_rule_accuracy
from zepad_mm.evaluation.session import Session


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
    return threshold_at(session.model.fusion(validation).dae_score, config.false_positive_rate)


def detection_rows(session: Session, validation: Tensor) -> list[dict[str, Any]]:
    """The detection rows of report.json: each score on each attack, and on the worst case of T2 and T3.

    ``worst`` and the T3 attacks hold only the pictures for which the attacker found a wrong answer: of several he
    shows, for each picture, the one whose score is lowest. That is the adaptive figure.
    """
    branches = list(session.default.members)
    clean = session.clean.logits[branches]
    groups: list[tuple[str, str, Tensor, Tensor]] = []
    for example in session.examples[1:]:
        if bool(example.attacked.any()) and not example.control:
            groups.append((example.threat, example.attack, example.logits[branches], example.attacked))
    rows = []
    for name in SCORES:
        score = SCORES.get(name)
        known = [score(logits, session.model.benign) for logits in (validation, clean)]
        found = [
            (threat, attack, score(logits, session.model.benign)[attacked], wrong[attacked])
            for threat, attack, logits, attacked in groups
            for wrong in [_wrong(session, logits)]
        ]
        for threat, included in (("T2", ("T2",)), ("T3", ("T2", "T3"))):
            if any(group[0] == threat for group in groups):
                lowest = _lowest(session, name, [logits for kind, _, logits, _ in groups if kind in included])
                found.append((threat, "worst", lowest, torch.ones_like(lowest, dtype=torch.bool)))
        for threat, attack, scores, wrong in found:
            if len(scores):
                figures = asdict(detect(known[0], known[1], scores))
                successful = detect(known[0], known[1], scores[wrong]).auroc if bool(wrong.any()) else None
                paper = paper_rule_accuracy(known[1], scores) if name == "confidence_gap" else None
                rows.append(
                    {
                        "model": "zepad",
                        "score": name,
                        "threat": threat,
                        "attack": attack,
                        **figures,
                        "accuracy_paper_rule": paper,
                        "n": len(scores),
                        "auroc_successful": successful,
                        "n_successful": int(wrong.sum()),
                        "adaptive": threat == "T3",
                        "paper_gap": PAPER_GAP,
                    }
                )
    return rows


def _wrong(session: Session, logits: Tensor) -> Tensor:
    return session.model.fusion(logits).logits.argmax(-1) != session.labels


def _lowest(session: Session, name: str, candidates: list[Tensor]) -> Tensor:
    """(k,) lowest score of each picture among the examples (N, n, C) that make the model wrong."""
    best = torch.full((len(session.labels),), torch.inf)
    for logits in candidates:
        scores = SCORES.get(name)(logits, session.model.benign)
        best = torch.where(_wrong(session, logits), torch.minimum(best, scores), best)
    return best[best.isfinite()]
