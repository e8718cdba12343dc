"""The threat models, from weak to strong. Each adds attacked examples to the session; nothing is judged here.

All rows are judged on all examples (a shared pool): an attack made for one fusion rule is tried on every other, which
is what uncovers a rule that merely hides its gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from zepad_mm.attacks import (
    APGD,
    PGD,
    UNIVERSAL_ATTACKS,
    Attack,
    DetectorAware,
    FusedAttack,
    Perturbation,
    Square,
    UniversalAttack,
)
from zepad_mm.evaluation.session import UNDEFENDED, Example, Row, Session, Through

log = logging.getLogger(__name__)


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
    session.add(_of_all(session, "T1", "random_noise", budget, found, control=True))


def run_universal(session: Session, threat: str) -> None:
    """T1: perturbations made on the public encoder; T1b: on each branch's encoder, and on all of them at once."""
    if threat == "T1":
        run_noise(session)
    settings = session.settings
    names = settings.universal if threat == "T1" else settings.universal_family
    for name in names:
        for where in universal_targets(session, threat):
            _universal(session, threat, name, where)


def universal_targets(session: Session, threat: str) -> list[str]:
    """The encoders that T1 or T1b perturbations are made on; "family" is all branches at once."""
    if threat == "T1":
        return [UNDEFENDED]
    branches = [row.name for row in session.branch_rows]
    return [*branches, "family"] if len(branches) > 1 else branches


def universal_attack(session: Session, threat: str, name: str) -> UniversalAttack:
    """A registered attack in the size and strength that the settings ask for."""
    settings, side = session.settings, session.images.shape[-1]
    attack = UNIVERSAL_ATTACKS.get(name)(epsilon=settings.epsilon_universal, image_size=side, seed=settings.seed)
    steps = settings.universal_steps if threat == "T1" else settings.family_steps
    return replace(attack, steps=steps.get(name, attack.steps))


def _universal(session: Session, threat: str, name: str, where: str) -> None:
    settings = session.settings
    made = f"{name}@{where}"
    attack = universal_attack(session, threat, name)
    targets = [row.name for row in session.branch_rows] if where == "family" else [where]

    def work() -> dict[str, Tensor]:
        chosen = {name: session.encoder(name) for name in targets}
        surrogate = session.data.surrogate.images.to(session.device)
        perturbation = attack.fit(chosen, surrogate, generator=session.generator("craft", made))
        if session.out is not None:
            perturbation.save(session.out / "perturbations" / f"{made.replace(':', '_')}.safetensors")
        return {"delta": perturbation.delta, "logits": session.score(perturbation(session.images))}

    found = session.stage(f"{threat} {made}", work)
    session.deltas[made] = found["delta"]
    session.add(_of_all(session, threat, made, settings.epsilon_universal, found))


def run_white_box(session: Session) -> None:
    """T2: first a pool that strikes the parts, then each row's own attack on what survived the pool."""
    for made, delta in session.deltas.items():
        _rescaled(session, made, delta)
    fused = session.fused_rows
    robust = tuple(i for i, benign in enumerate(session.model.benign) if not benign)
    everyone = tuple(range(len(session.branch_rows)))
    pools = session.settings.pools
    for row in session.branch_rows:
        if "branch" in pools and session.twins(row) is None:
            _pool(session, f"pgd@{row.name}", Through(session.parts(row.members), None), [row, *fused])
    if "robust_branches" in pools and 1 < len(robust) < len(everyone):
        _pool(session, "pgd@robust_branches", Through(session.parts(robust), None), fused)
    if "all_branches" in pools and len(everyone) > 1:
        _pool(session, "pgd@all_branches", Through(session.parts(everyone), None), fused)
    for row in session.rows:
        if session.twins(row) is not None:
            continue
        if session.settings.skip_settled and row.fused and _below_the_default(session, row):
            session.settled.append(row.name)
            continue
        for kind in session.settings.own_attacks:
            if kind != "pgd_from_t1" or session.deltas:
                _own(session, row, kind)
        if row is session.default and row.fused:
            for loss in session.settings.adaptive:
                _adaptive(session, loss)


def _below_the_default(session: Session, row: Row) -> bool:
    """Whether a rule is behind already: attacks of its own could only put it further back."""
    held, best = (int(session.still_right(which).sum()) for which in (row, session.default))
    return held < best


def own_attack(session: Session, kind: str, *, steps: int | None = None, epsilon: float | None = None) -> Attack:
    """The attack that a row faces on its own, by name of ``OWN_ATTACKS``."""
    settings = session.settings
    budget = settings.epsilon if epsilon is None else epsilon
    count, restarts = steps or settings.steps, settings.restarts
    made: dict[str, Callable[[], Attack]] = {
        "pgd": lambda: PGD(epsilon=budget, steps=count, restarts=restarts, loss="margin"),
        "pgd_from_t1": lambda: PGD(epsilon=budget, steps=count, loss="margin"),
        "apgd": lambda: APGD(epsilon=budget, steps=count, restarts=restarts, loss="margin"),
        "apgd_targeted": lambda: APGD(epsilon=budget, steps=count, restarts=1, loss="targeted"),
        "square": lambda: Square(epsilon=budget, queries=settings.square_queries),
    }
    return made[kind]()


def strike(
    session: Session, attack: Attack, target: Through, index: Tensor, purpose: str, start: Perturbation | None = None
) -> Tensor:
    """Attacked versions of the test pictures at ``index`` (k,), in batches: (k, 3, H, W).

    Every batch is kept as it is finished, under the name of its ``purpose``, until the stage is.
    """
    struck = [session.images[:0]]
    for batch, rows in enumerate(index.split(session.settings.batch_size) if len(index) else ()):

        def work(batch: int = batch, rows: Tensor = rows) -> Tensor:
            images, labels = session.images[rows].to(session.device), session.labels[rows].to(session.device)
            begin = None if start is None else start(images)
            generator = session.generator(purpose, batch)
            return attack(target, images, labels, generator=generator, start=begin).cpu()

        struck.append(session.part(purpose, batch, work))
    return torch.cat(struck)


def _strike_and_score(
    session: Session,
    attack: Attack,
    target: Through,
    mask: Tensor,
    name: str,
    start: Perturbation | None = None,
) -> dict[str, Tensor]:
    struck = strike(session, attack, target, mask.nonzero()[:, 0], name, start)
    return {"logits": session.score(struck, mask), "attacked": mask}


def _pool(session: Session, name: str, target: Through, rows: list[Row]) -> None:
    """A pool member, run to its end on every picture that one of these rows still gets right."""
    settings = session.settings
    mask = torch.stack([session.still_right(row) for row in rows]).any(0)
    attack = PGD(epsilon=settings.epsilon, steps=settings.steps, loss="margin", stop_when_wrong=False)
    found = session.stage(f"T2 {name}", lambda: _strike_and_score(session, attack, target, mask, name))
    session.add(_of_some(session, "T2", name, settings.epsilon, found))


def _own(session: Session, row: Row, kind: str) -> None:
    """A row's own attack, on the pictures that it got right so far."""
    name, settings = f"{kind}@{row.name}:own", session.settings
    if row.fused:
        name = f"{kind}@{row.name}"
    mask, start = session.still_right(row), None
    if kind == "pgd_from_t1":  # the last one was made on the most encoders
        start = Perturbation(list(session.deltas.values())[-1], settings.epsilon_universal).rescaled(settings.epsilon)
    attack, target = own_attack(session, kind), session.through(row)
    found = session.stage(f"T2 {name}", lambda: _strike_and_score(session, attack, target, mask, name, start))
    session.add(_of_some(session, "T2", name, settings.epsilon, found))


def _adaptive(session: Session, loss: str) -> None:
    """An attack that knows what the model as it ships is made of, on what that still gets right."""
    name, settings, row = f"{loss}@zepad", session.settings, session.default
    mask = session.still_right(row)
    attack = FusedAttack(
        fuse=session.model.fusion, loss=loss, epsilon=settings.epsilon, steps=settings.steps, restarts=settings.restarts
    )
    target = Through(session.parts(row.members), None)
    found = session.stage(f"T2 {name}", lambda: _strike_and_score(session, attack, target, mask, name))
    session.add(_of_some(session, "T2", name, settings.epsilon, found))


def _rescaled(session: Session, made: str, delta: Tensor) -> None:
    """A universal perturbation at T2's budget, as a pool member: what transfers must not beat what is white-box."""
    settings = session.settings
    perturbation = Perturbation(delta, settings.epsilon_universal).rescaled(settings.epsilon)
    found = session.stage(f"T2 {made}", lambda: {"logits": session.score(perturbation(session.images))})
    session.add(_of_all(session, "T2", made, settings.epsilon, found))


def run_detector_aware(session: Session, threshold: float) -> None:
    """T3: wrong and not flagged. Each attack goes on with the pictures for which no example so far does that."""
    for mode in session.settings.evasion:
        broken = torch.zeros(len(session.labels), dtype=torch.bool)
        for example in session.examples:
            if example.threat in ("clean", "T2", "T3"):
                broken |= evaded(session, example.logits, threshold)
        _evade(session, mode, ~broken, threshold)


def evaded(session: Session, logits: Tensor, threshold: float) -> Tensor:
    """(n,) bool: the model as it ships is wrong, and its score does not exceed the threshold."""
    row = session.default
    decision = session.model.fusion(logits[list(row.members)])
    return (decision.logits.argmax(-1) != session.labels) & (decision.dae_score <= threshold)


def _evade(session: Session, mode: str, mask: Tensor, threshold: float) -> None:
    settings, fusion, members = session.settings, session.model.fusion, session.default.members
    clean = fusion(session.clean.logits[list(members)])
    attack = DetectorAware(
        fuse=fusion,
        score=lambda logits: fusion(logits).dae_score,
        threshold=threshold,
        spread=max(float(clean.dae_score.std()) if len(session.labels) > 1 else 0.0, 1e-6),
        mode=mode,
        epsilon=settings.epsilon,
        steps=settings.detector_steps,
    )
    name, target = f"{mode}@zepad", Through(session.parts(members), None)
    found = session.stage(f"T3 {name}", lambda: _strike_and_score(session, attack, target, mask, name))
    session.add(_of_some(session, "T3", name, settings.epsilon, found))


def _of_all(
    session: Session, threat: str, attack: str, epsilon: float, found: dict[str, Tensor], control: bool = False
) -> Example:
    everything = torch.ones(len(session.labels), dtype=torch.bool)
    return Example(threat, attack, epsilon, found["logits"], everything, float(found["seconds"]), control)


def _of_some(session: Session, threat: str, attack: str, epsilon: float, found: dict[str, Tensor]) -> Example:
    return Example(threat, attack, epsilon, found["logits"], found["attacked"].bool(), float(found["seconds"]))
