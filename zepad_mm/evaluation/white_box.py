"""T2 and T3: every picture is attacked through the whole defence. Each adds attacked examples; nothing is judged here.

All rows are judged on all examples (a shared pool): an attack made for one fusion rule is tried on every other, which
is what uncovers a rule that merely hides its gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zepad_mm.attacks import APGD, PGD, Attack, DetectorAware, FusedAttack, Perturbation, Square
from zepad_mm.evaluation.context import Example, Row, Session, Through
from zepad_mm.evaluation.universal import of_all

log = logging.getLogger(__name__)


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
    kinds = [kind for kind in session.settings.own_attacks if kind != "pgd_from_t1" or session.deltas]
    if session.settings.norm != "linf" and "square" in kinds:
        log.warning("square knows no budget but L-inf: left out")
        kinds.remove("square")
    for row in session.rows:
        if session.twins(row) is not None:
            continue
        if session.settings.skip_settled and row.fused and _below_the_default(session, row):
            session.settled.append(row.name)
            continue
        for kind in kinds:
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
    count, restarts, norm = steps or settings.steps, settings.restarts, settings.norm
    made: dict[str, Callable[[], Attack]] = {
        "pgd": lambda: PGD(epsilon=budget, norm=norm, steps=count, restarts=restarts, loss="margin"),
        "pgd_from_t1": lambda: PGD(epsilon=budget, norm=norm, steps=count, loss="margin"),
        "apgd": lambda: APGD(epsilon=budget, norm=norm, steps=count, restarts=restarts, loss="margin"),
        "apgd_targeted": lambda: APGD(
            epsilon=budget, norm=norm, steps=count, restarts=1, loss="targeted", targets=settings.targets
        ),
        "square": lambda: Square(epsilon=budget, queries=settings.square_queries),
    }
    return made[kind]()


def strike(
    session: Session, attack: Attack, target: Through, index: Tensor, purpose: str, start: Perturbation | None = None
) -> Tensor:
    """Attacked versions of the test pictures at ``index`` (k,), in batches: (k, 3, H, W).

    Every batch is kept as it is finished, under the name of its ``purpose``, until the stage is; each is struck by one
    of the processes.
    """

    def work(batch: int, rows: Tensor) -> Tensor:
        images, labels = session.images[rows].to(session.device), session.labels[rows].to(session.device)
        begin = None if start is None else start(images)
        generator = session.generator(purpose, batch)
        return attack(target, images, labels, generator=generator, start=begin).cpu()

    batches = enumerate(index.split(session.settings.batch_size) if len(index) else ())
    works = [partial(session.part, purpose, batch, partial(work, batch, rows)) for batch, rows in batches]
    return torch.cat([session.images[:0], *session.processes.shared(works)])


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
    attack = PGD(
        epsilon=settings.epsilon, norm=settings.norm, steps=settings.steps, loss="margin", stop_when_wrong=False
    )
    found = session.stage(f"T2 {name}", lambda: _strike_and_score(session, attack, target, mask, name))
    session.add(_of_some(session, "T2", name, found))


def _own(session: Session, row: Row, kind: str) -> None:
    """A row's own attack, on the pictures that it got right so far."""
    name = f"{kind}@{row.name}:own"
    if row.fused:
        name = f"{kind}@{row.name}"
    mask, start = session.still_right(row), None
    if kind == "pgd_from_t1":  # the last one was made on the most encoders
        start = _at_t2s_budget(session, list(session.deltas.values())[-1])
    attack, target = own_attack(session, kind), session.through(row)
    found = session.stage(f"T2 {name}", lambda: _strike_and_score(session, attack, target, mask, name, start))
    session.add(_of_some(session, "T2", name, found))


def _adaptive(session: Session, loss: str) -> None:
    """An attack that knows what the model as it ships is made of, on what that still gets right."""
    name, settings, row = f"{loss}@zepad", session.settings, session.default
    mask = session.still_right(row)
    attack = FusedAttack(
        fuse=session.model.fusion,
        loss=loss,
        epsilon=settings.epsilon,
        norm=settings.norm,
        steps=settings.steps,
        restarts=settings.restarts,
    )
    target = Through(session.parts(row.members), None)
    found = session.stage(f"T2 {name}", lambda: _strike_and_score(session, attack, target, mask, name))
    session.add(_of_some(session, "T2", name, found))


def _rescaled(session: Session, made: str, delta: Tensor) -> None:
    """A universal perturbation at T2's budget, as a pool member: what transfers must not beat what is white-box."""
    perturbation = _at_t2s_budget(session, delta)
    found = session.stage(f"T2 {made}", lambda: {"logits": session.score(perturbation(session.images))})
    session.add(of_all(session, "T2", made, session.settings.epsilon, found, session.settings.norm))


def _at_t2s_budget(session: Session, delta: Tensor) -> Perturbation:
    """The pattern of a universal perturbation, as large as T2 allows."""
    settings = session.settings
    if settings.norm == "linf":
        return Perturbation(delta, settings.epsilon_universal).rescaled(settings.epsilon)
    return Perturbation.fit_budget(delta * (settings.epsilon / delta.norm().clamp_min(1e-12)), settings.epsilon, "l2")


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
    return (decision.logits.argmax(-1) != session.labels) & (decision.score <= threshold)


def _evade(session: Session, mode: str, mask: Tensor, threshold: float) -> None:
    settings, fusion, members = session.settings, session.model.fusion, session.default.members
    clean = fusion(session.clean.logits[list(members)])
    attack = DetectorAware(
        fuse=fusion,
        score=lambda logits: fusion(logits).score,
        threshold=threshold,
        spread=max(float(clean.score.std()) if len(session.labels) > 1 else 0.0, 1e-6),
        mode=mode,
        epsilon=settings.epsilon,
        norm=settings.norm,
        steps=settings.detector_steps,
    )
    name, target = f"{mode}@zepad", Through(session.parts(members), None)
    found = session.stage(f"T3 {name}", lambda: _strike_and_score(session, attack, target, mask, name))
    session.add(_of_some(session, "T3", name, found))


def _of_some(session: Session, threat: str, attack: str, found: dict[str, Tensor]) -> Example:
    budget, norm, seconds = session.settings.epsilon, session.settings.norm, float(found["seconds"])
    return Example(threat, attack, budget, found["logits"], found["attacked"].bool(), seconds, norm=norm)
