"""What holds without trust in the benign branches: the margin certificate of the fusion, counted on the pictures."""

from __future__ import annotations

import torch

from zepad_mm.evaluation.context import Session


def certified_shares(session: Session) -> dict[str, float] | None:
    """Threat to the share of pictures answered right, and certified so, on clean pictures and all its examples.

    "T2" is thus the accuracy against all examples found if the attacker could also put any answer into the benign
    branches. None where the rule allows no certificate.
    """
    fusion, members = session.model.fusion, list(session.default.members)
    held = torch.ones(len(session.labels), dtype=torch.bool)
    shares = {}
    for example in session.examples:
        if example.control or example.threat not in ("clean", "T2"):
            continue
        logits = example.logits[members]
        certified = fusion.certified(logits)
        if certified is None:
            return None
        held &= certified & (fusion(logits).logits.argmax(-1) == session.labels)
        shares[example.threat] = float(held.float().mean())
    return shares
