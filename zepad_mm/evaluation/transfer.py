"""T1i and T1ib: each image is attacked on the public encoder or on one branch, and tried on every row."""

from __future__ import annotations

from typing import Any

from zepad_mm.attacks import ATTACKS, Attack
from zepad_mm.evaluation.session import Session
from zepad_mm.evaluation.subjects import Row
from zepad_mm.evaluation.threats import T1I, T1IB, ThreatModel
from zepad_mm.evaluation.universal import attack_name
from zepad_mm.evaluation.white_box import attack_and_add
from zepad_mm.utils.text import budget_text


def run_public_transfer(session: Session) -> None:
    """T1i: made on the undefended model, which is the public encoder with a head for the class names."""
    _transfer_from(session, T1I, session.reference)


def run_branch_transfer(session: Session) -> None:
    """T1ib: made on each branch of the defence."""
    for row in _targets(session):
        _transfer_from(session, T1IB, row)


def count_public_transfer(session: Session) -> int:
    """Number of stages of :func:`run_public_transfer`."""
    return len(session.settings.transfer) * len(session.settings.epsilons_transfer)


def count_branch_transfer(session: Session) -> int:
    """Number of stages of :func:`run_branch_transfer`."""
    return count_public_transfer(session) * len(_targets(session))


def transfer_attack(session: Session, algorithm: str, epsilon: float) -> Attack:
    """Return a registered attack that runs to its last step: for the strongest image, not the first success."""
    kind: Any = ATTACKS.get(algorithm)
    settings = session.settings
    return kind(epsilon=epsilon, norm=settings.norm, steps=settings.transfer_steps, stop_when_wrong=False)


def _targets(session: Session) -> list[Row]:
    return [row for row in session.branch_rows if session.equivalent_row(row) is None]


def _transfer_from(session: Session, threat: ThreatModel, row: Row) -> None:
    settings = session.settings
    for epsilon in settings.epsilons_transfer:
        for algorithm in settings.transfer:
            attack = transfer_attack(session, algorithm, epsilon)
            shown = f"{attack_name(algorithm, row.name)} {budget_text(epsilon, settings.norm)}"
            name = (shown, algorithm, row.name)
            attack_and_add(session, threat, name, attack, session.view(row), session.scope(threat))
