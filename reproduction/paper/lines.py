"""Models as arithmetic on branch logits, and the rows that accuracy and detection give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reproduction.paper.study import Line, Study
from zepad_mm.evaluation.metrics import detect, fooling_rate, paper_rule_accuracy, share
from zepad_mm.models import fusion
from zepad_mm.models.detection import SCORES


def fused(rule: str, members: tuple[str, ...], **constants: float) -> Line:
    """A fusion of encoders; those that no attack tuned are the benign ones."""
    benign = [not adversarial(name) for name in members]
    built = fusion.build(rule, benign, params=constants)
    return Line(members, lambda logits: built(logits).logits)


def single(name: str) -> Line:
    """One encoder alone."""
    return Line((name,), lambda logits: logits[0])


def adversarial(name: str) -> bool:
    """Whether an encoder was tuned on attacked pictures."""
    tuning = name.partition("+")[2]
    return bool(tuning) and not tuning.startswith("clean")


def main_lines(study: Study, victim: str) -> dict[str, Line]:
    """The rows of the main table."""
    config, members = study.config, study.defended(victim)
    return {
        "undefended": single(victim),
        "paper's": fused("rfdm", members),
        "paper's tuning, our rule": fused(config.rule, members, **config.rule_options),
        "ours": fused(config.rule, study.ours(victim), **config.rule_options),
    }


def answer(study: Study, line: Line, task: str, condition: str, split: str = "test") -> Tensor:
    """(n,) predicted classes of a line."""
    stacked = torch.stack([study.logits(task, name, condition, split) for name in line.members])
    return line.fuse(stacked).argmax(-1)


def row(
    study: Study, victim: str, task: str, model: str, line: Line, condition: str, threat: str, split: str = "test"
) -> dict[str, Any]:
    """Accuracy of one model under one condition, with its interval and the paper's ASR."""
    answers, labels = answer(study, line, task, condition, split), study.pictures(task, split).labels
    found = share(answers == labels)
    asr = None if condition == "clean" else fooling_rate(answer(study, line, task, "clean", split), answers)
    return {
        "victim": victim,
        "task": task,
        "model": model,
        "members": list(line.members),
        "threat": threat,
        "condition": condition,
        "accuracy": found.value,
        "ci_low": found.interval[0],
        "ci_high": found.interval[1],
        "n": found.n,
        "asr": asr,
    }


def rows_of(
    study: Study, victim: str, task: str, lines: dict[str, Line], family: bool = False, split: str = "test"
) -> list[dict[str, Any]]:
    """Every line of a victim under clean, every attack of T1, and where asked T1b."""
    conditions = [("clean", "clean"), *(("T1", name) for name in study.public(victim))]
    conditions += [("T1b", name) for name in study.family(victim)] if family else []
    return [
        row(study, victim, task, model, line, condition, threat, split)
        for threat, condition in conditions
        for model, line in lines.items()
    ]


def detection_rows(study: Study, victim: str, task: str, members: tuple[str, ...], model: str) -> list[dict[str, Any]]:
    """How well the scores tell clean from attacked test pictures, one to one; thresholds from validation pictures."""
    benign = [not adversarial(name) for name in members]

    def scores(name: str, condition: str, split: str = "test") -> Tensor:
        stacked = torch.stack([study.logits(task, member, condition, split) for member in members])
        return SCORES.get(name)(stacked, benign)

    rows = []
    for score in ("confidence_gap", "jensen_shannon"):
        reference, clean = scores(score, "clean", "validation"), scores(score, "clean")
        for condition in (*study.public(victim), *study.family(victim)):
            attacked = scores(score, condition)
            found = detect(reference, clean, attacked)
            rule = paper_rule_accuracy(clean, attacked) if score == "confidence_gap" else None
            rows.append(
                {
                    "victim": victim,
                    "task": task,
                    "model": model,
                    "score": score,
                    "condition": condition,
                    "auroc": found.auroc,
                    "tpr_at_fpr1": found.tpr_at_fpr1,
                    "tpr_at_fpr5": found.tpr_at_fpr5,
                    "accuracy_paper_rule": rule,
                    "n": len(clean) + len(attacked),
                }
            )
    return rows
