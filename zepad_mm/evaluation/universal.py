"""T1, T1p and T1b: one perturbation or patch for all images. Each function adds attacked examples to the session."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from zepad_mm.attacks import UNIVERSAL_ATTACKS, Perturbation, UniversalAttack, published_variants
from zepad_mm.attacks.perturbation import patch_size
from zepad_mm.attacks.universal.base import PatchAttack
from zepad_mm.evaluation.session import Example, Session
from zepad_mm.evaluation.subjects import UNDEFENDED
from zepad_mm.evaluation.threats import CLEAN, T1, T1B, T1P, ThreatModel

log = logging.getLogger(__name__)

FAMILY = "family"  # target of a perturbation made on all branches at once


def run_clean(session: Session) -> None:
    """Score the clean images."""
    found = session.stage(f"{CLEAN} none", lambda: {"logits": session.score(session.images)})
    nothing = torch.zeros(len(session.labels), dtype=torch.bool)
    session.add(Example(CLEAN.key, "none", 0.0, found["logits"], nothing, float(found["seconds"]), algorithm="none"))


def run_public_universal(session: Session) -> None:
    """T1: random noise as the control, published perturbations, and those made on the public encoder."""
    _score_noise(session)
    for path in session.settings.published:
        _score_published(session, path)
    for algorithm in session.settings.universal:
        _craft_and_score(session, T1, algorithm, UNDEFENDED)


def run_family_universal(session: Session) -> None:
    """T1b: perturbations made on each branch's encoder, and on all of them at once."""
    for algorithm in session.settings.universal_family:
        for target in family_targets(session):
            _craft_and_score(session, T1B, algorithm, target)


def run_patches(session: Session) -> None:
    """T1p: a patch of random pixels as the control, and patches made on the public encoder."""
    first, side = universal_attack(session, T1P, session.settings.patches[0]), session.images.shape[-1]
    assert isinstance(first, PatchAttack)
    size, place = patch_size((side, side), first.epsilon), first.place

    def random_patch() -> Perturbation:
        pixels = torch.rand(3, *size, generator=session.generator("random patch"))
        return Perturbation(pixels, first.epsilon, "patch", place=place)

    _score_patch(session, "random_patch", "", random_patch, control=True)
    for algorithm in session.settings.patches:
        attack = universal_attack(session, T1P, algorithm)
        _score_patch(session, algorithm, UNDEFENDED, partial(_craft, session, attack, algorithm, UNDEFENDED))


def count_public(session: Session) -> int:
    """Number of stages of :func:`run_public_universal`."""
    return 1 + len(session.settings.published) + len(session.settings.universal)


def count_family(session: Session) -> int:
    """Number of stages of :func:`run_family_universal`."""
    return len(session.settings.universal_family) * len(family_targets(session))


def count_patches(session: Session) -> int:
    """Number of stages of :func:`run_patches`."""
    return 1 + len(session.settings.patches)


def family_targets(session: Session) -> list[str]:
    """What T1b's perturbations are made on: each branch, and all branches at once."""
    branches = [row.name for row in session.branch_rows]
    return [*branches, FAMILY] if len(branches) > 1 else branches


def universal_attack(session: Session, threat: ThreatModel, algorithm: str) -> UniversalAttack:
    """Return a registered attack with the budget, image size and steps of the settings."""
    settings, side = session.settings, session.images.shape[-1]
    assert threat.budget is not None
    epsilon, _ = threat.budget(settings)
    attack = UNIVERSAL_ATTACKS.get(algorithm)(epsilon=epsilon, image_size=side, seed=settings.seed)
    steps = settings.family_steps if threat is T1B else settings.universal_steps
    return replace(attack, steps=steps.get(algorithm, attack.steps))


def attack_name(algorithm: str, target: str) -> str:
    """An attack as tables show it: "feature_uap@undefended"."""
    return f"{algorithm}@{target}" if target else algorithm


def _score_noise(session: Session) -> None:
    """The control of T1: random signs at the full budget, one pattern for all images. An attack must beat it."""
    epsilon = session.settings.epsilon_universal

    def work() -> dict[str, Tensor]:
        shape = session.images.shape[1:]
        signs = torch.randint(2, shape, generator=session.generator("noise")) * 2.0 - 1
        return {"logits": session.score((session.images + epsilon * signs).clamp(0, 1))}

    found = session.stage(f"{T1} random_noise", work)
    session.add(on_all_images(session, T1, "random_noise", "", found, control=True))


def _score_published(session: Session, path: str) -> None:
    """A perturbation that others published, in the form that leaves the model as it ships the fewest right answers.

    A file of another size or budget is brought to T1's in several ways (see ``published_variants``); the attacker
    takes the best.
    """
    algorithm, epsilon = f"published:{Path(path).stem}", session.settings.epsilon_universal

    def work() -> dict[str, Tensor]:
        tried = list[tuple[int, Perturbation, Tensor]]()
        for perturbation in published_variants(path, epsilon=epsilon, image_size=session.images.shape[-1]):
            logits = session.score(perturbation(session.images))
            right = int((session.default.answer(logits).argmax(-1) == session.labels).sum())
            tried.append((right, perturbation, logits))
        _, chosen, logits = min(tried, key=lambda entry: entry[0])
        log.info("%s: fit by %s, length by %s", path, chosen.provenance["fit"], chosen.provenance["restore"])
        if session.out is not None and session.processes.first:
            chosen.save(session.out / "perturbations" / f"{algorithm.replace(':', '_')}.safetensors")
        return {"delta": chosen.delta, "logits": logits}

    found = session.stage(f"{T1} {algorithm}", work)
    session.deltas[algorithm, ""] = found["delta"]
    session.add(on_all_images(session, T1, algorithm, "", found))


def _score_patch(
    session: Session, algorithm: str, target: str, make: Callable[[], Perturbation], control: bool = False
) -> None:
    name = attack_name(algorithm, target)
    found = session.stage(f"{T1P} {name}", lambda: {"logits": session.score(make()(session.images))})
    session.add(on_all_images(session, T1P, algorithm, target, found, control))


def _craft_and_score(session: Session, threat: ThreatModel, algorithm: str, target: str) -> None:
    attack = universal_attack(session, threat, algorithm)

    def work() -> dict[str, Tensor]:
        perturbation = _craft(session, attack, algorithm, target)
        return {"delta": perturbation.delta, "logits": session.score(perturbation(session.images))}

    found = session.stage(f"{threat} {attack_name(algorithm, target)}", work)
    session.deltas[algorithm, target] = found["delta"]
    session.add(on_all_images(session, threat, algorithm, target, found))


def _craft(session: Session, attack: UniversalAttack, algorithm: str, target: str) -> Perturbation:
    """A perturbation made on the encoder of this target, kept in the folder of the evaluation."""
    name = attack_name(algorithm, target)
    names = [row.name for row in session.branch_rows] if target == FAMILY else [target]
    encoders = {member: session.encoder(member) for member in names}
    surrogate = session.data.surrogate.images.to(session.device)
    perturbation = session.perturbations.get(name, attack, encoders, surrogate, session.generator("craft", name))
    if session.out is not None:
        perturbation.save(session.out / "perturbations" / f"{name.replace(':', '_')}.safetensors")
    return perturbation


def on_all_images(
    session: Session,
    threat: ThreatModel,
    algorithm: str,
    target: str,
    found: dict[str, Tensor],
    control: bool = False,
) -> Example:
    """An example of every image, from what a stage found."""
    assert threat.budget is not None
    epsilon, norm = threat.budget(session.settings)
    name, everything = attack_name(algorithm, target), torch.ones(len(session.labels), dtype=torch.bool)
    seconds = float(found["seconds"])
    return Example(threat.key, name, epsilon, found["logits"], everything, seconds, control, norm, algorithm, target)
