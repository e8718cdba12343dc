"""T1, T1p and T1b: one perturbation or patch for all pictures. Each adds attacked examples; nothing is judged here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from zepad_mm.attacks import UNIVERSAL_ATTACKS, Perturbation, UniversalAttack, load_published
from zepad_mm.attacks.patch import patch_size
from zepad_mm.attacks.universal.patch_attack import Patched
from zepad_mm.evaluation.context import UNDEFENDED, Example, Session


def run_clean(session: Session) -> None:
    """The pictures as they are."""
    found = session.stage("clean none", lambda: {"logits": session.score(session.images)})
    everything = torch.zeros(len(session.labels), dtype=torch.bool)
    session.add(Example("clean", "none", 0.0, found["logits"], everything, float(found["seconds"])))


def run_noise(session: Session) -> None:
    """The control: random signs of T1's size, one pattern for all pictures. An attack must beat this."""
    budget = session.settings.epsilon_universal

    def work() -> dict[str, Tensor]:
        shape = session.images.shape[1:]
        signs = torch.randint(2, shape, generator=session.generator("noise")) * 2.0 - 1
        return {"logits": session.score((session.images + budget * signs).clamp(0, 1))}

    found = session.stage("T1 random_noise", work)
    session.add(of_all(session, "T1", "random_noise", budget, found, control=True))


def run_universal(session: Session, threat: str) -> None:
    """T1: perturbations made on the public encoder; T1b: on each branch's encoder, and on all of them at once."""
    settings = session.settings
    if threat == "T1":
        run_noise(session)
        for path in settings.published:
            _published(session, path)
    names = settings.universal if threat == "T1" else settings.universal_family
    for name in names:
        for where in universal_targets(session, threat):
            _universal(session, threat, name, where)


def run_patches(session: Session) -> None:
    """T1p: patches made on the public encoder, and as the control one of random pixels in the place of the first."""
    first, side = universal_attack(session, "T1p", session.settings.patches[0]), session.images.shape[-1]
    assert isinstance(first, Patched)
    size, place = patch_size((side, side), first.epsilon), first.place

    def random_patch() -> Perturbation:
        pixels = torch.rand(3, *size, generator=session.generator("random patch"))
        return Perturbation(pixels, first.epsilon, "patch", place=place)

    _patch(session, "random_patch", random_patch, control=True)
    for name in session.settings.patches:
        made = f"{name}@{UNDEFENDED}"
        _patch(session, made, partial(_crafted, session, universal_attack(session, "T1p", name), made, [UNDEFENDED]))


def _patch(session: Session, name: str, make: Callable[[], Perturbation], control: bool = False) -> None:
    found = session.stage(f"T1p {name}", lambda: {"logits": session.score(make()(session.images))})
    session.add(of_all(session, "T1p", name, session.settings.area, found, "patch", control))


def _published(session: Session, path: str) -> None:
    """A perturbation that somebody else made, cut to T1's budget."""
    name, budget = f"published:{Path(path).stem}", session.settings.epsilon_universal

    def work() -> dict[str, Tensor]:
        perturbation = load_published(path, epsilon=budget, image_size=session.images.shape[-1])
        return {"delta": perturbation.delta, "logits": session.score(perturbation(session.images))}

    found = session.stage(f"T1 {name}", work)
    session.deltas[name] = found["delta"]
    session.add(of_all(session, "T1", name, budget, found))


def universal_targets(session: Session, threat: str) -> list[str]:
    """The encoders that perturbations are made on; "family" is all branches at once."""
    if threat != "T1b":
        return [UNDEFENDED]
    branches = [row.name for row in session.branch_rows]
    return [*branches, "family"] if len(branches) > 1 else branches


def universal_attack(session: Session, threat: str, name: str) -> UniversalAttack:
    """A registered attack in the size and strength that the settings ask for."""
    settings, side = session.settings, session.images.shape[-1]
    budget = settings.area if threat == "T1p" else settings.epsilon_universal
    attack = UNIVERSAL_ATTACKS.get(name)(epsilon=budget, image_size=side, seed=settings.seed)
    steps = settings.family_steps if threat == "T1b" else settings.universal_steps
    return replace(attack, steps=steps.get(name, attack.steps))


def _universal(session: Session, threat: str, name: str, where: str) -> None:
    settings = session.settings
    made = f"{name}@{where}"
    attack = universal_attack(session, threat, name)
    targets = [row.name for row in session.branch_rows] if where == "family" else [where]

    def work() -> dict[str, Tensor]:
        perturbation = _crafted(session, attack, made, targets)
        return {"delta": perturbation.delta, "logits": session.score(perturbation(session.images))}

    found = session.stage(f"{threat} {made}", work)
    session.deltas[made] = found["delta"]
    session.add(of_all(session, threat, made, settings.epsilon_universal, found))


def _crafted(session: Session, attack: UniversalAttack, made: str, targets: list[str]) -> Perturbation:
    """A perturbation made on the encoders of these members, kept in the folder of the evaluation."""
    chosen = {name: session.encoder(name) for name in targets}
    surrogate = session.data.surrogate.images.to(session.device)
    perturbation = attack.fit(chosen, surrogate, generator=session.generator("craft", made))
    if session.out is not None:
        perturbation.save(session.out / "perturbations" / f"{made.replace(':', '_')}.safetensors")
    return perturbation


def of_all(
    session: Session,
    threat: str,
    attack: str,
    epsilon: float,
    found: dict[str, Tensor],
    norm: str = "linf",
    control: bool = False,
) -> Example:
    """An example of every picture, from what a stage found."""
    everything = torch.ones(len(session.labels), dtype=torch.bool)
    return Example(threat, attack, epsilon, found["logits"], everything, float(found["seconds"]), control, norm)
