"""The white-box evaluation (T2, and T3 against the detector): each image is attacked through the whole defence.

All rows are judged on all examples (a shared pool): an attack made for one fusion rule is tried on every other, which
uncovers rules that merely mask their gradients. Each function adds attacked examples to the session.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zepad_mm.attacks import (
    APGD,
    PGD,
    Attack,
    DetectorAware,
    FusedAttack,
    MomentumIterative,
    MomentumPGD,
    Perturbation,
    RayS,
    Square,
    SuperclassAttack,
)
from zepad_mm.attacks.adaptive import Fuse
from zepad_mm.evaluation.session import Example, Session
from zepad_mm.evaluation.subjects import BranchView, Row
from zepad_mm.evaluation.surrogate_views import can_change_prompts, has_encoder, on_patch_tokens, with_prompts
from zepad_mm.evaluation.threats import CLEAN, T2, T3, THREATS, RowKind, ThreatModel
from zepad_mm.evaluation.universal import attack_name, on_all_images

log = logging.getLogger(__name__)

QUICK_STEPS = 10  # of "pgd_quick", which removes the images that any attack breaks
# loss on the fusion -> the optimiser that suits it, and how many times the steps: through a gate, only a long run of
# momentum PGD on the margin comes near the end
DRIVEN = {"fused_margin": ("momentum", 12), "mora": ("momentum", 1)}


@dataclass(frozen=True)
class PoolAttack:
    """An attack of the shared pool: on some members at once, for all rows that contain them."""

    target: str
    members: tuple[int, ...]
    rows: tuple[Row, ...]


def run_white_box(session: Session) -> None:
    """T2: first the shared pool, then each row's own attacks on the images that survived it."""
    for (algorithm, target), delta in session.deltas.items():
        _score_rescaled(session, algorithm, target, delta)
    for pool in pool_attacks(session):
        _attack_pool(session, pool)
    algorithms = own_algorithms(session)
    for row in attacked_rows(session):
        if session.settings.skip_settled and row.fused and _below_default(session, row):
            session.skipped_rows.append(row.name)
            session.bar.total -= sum(attacks_row(session, row, algorithm) for algorithm in algorithms)
            continue
        for algorithm in algorithms:
            if attacks_row(session, row, algorithm):
                _attack_row(session, row, algorithm)
        if row is session.default and has_adaptive(session):
            for loss in session.settings.adaptive:
                _attack_fusion(session, loss)
            if session.settings.superclasses:
                _attack_superclass(session)


def count_white_box(session: Session) -> int:
    """Number of stages of :func:`run_white_box` beside the rescaled perturbations; rows may be skipped later."""
    settings = session.settings
    adaptive = len(settings.adaptive) + bool(settings.superclasses) if has_adaptive(session) else 0
    rows, algorithms = attacked_rows(session), own_algorithms(session)
    own = sum(attacks_row(session, row, algorithm) for row in rows for algorithm in algorithms)
    return len(pool_attacks(session)) + own + adaptive


def pool_attacks(session: Session) -> list[PoolAttack]:
    """The shared pool: each branch, the robust branches at once, and all branches at once."""
    fused, branches, pools = tuple(session.fused_rows), session.branch_rows, session.settings.pools
    everyone = session.default.members
    robust = tuple(index for index, benign in zip(everyone, session.subject.benign, strict=False) if not benign)
    found = []
    if "branch" in pools:
        found += [
            PoolAttack(row.name, row.members, (row, *fused)) for row in branches if session.equivalent_row(row) is None
        ]
    if "robust_branches" in pools and 1 < len(robust) < len(everyone):
        found.append(PoolAttack("robust_branches", robust, fused))
    if "all_branches" in pools and len(everyone) > 1:
        found.append(PoolAttack("all_branches", everyone, fused))
    return found


def own_algorithms(session: Session) -> list[str]:
    """The attacks that every row faces on its own, of ``OWN_ATTACKS``."""
    chosen = [name for name in session.settings.own_attacks if name != "pgd_from_t1" or session.deltas]
    for name in ("square", "rays"):
        if session.settings.norm != "linf" and name in chosen:
            log.warning("%s has an L-inf budget only: left out", name)
            chosen.remove(name)
    return chosen


def attacks_row(session: Session, row: Row, algorithm: str) -> bool:
    """Whether an attack of ``OWN_ATTACKS`` applies to a row.

    Attacks on other prompts and without any gradient take the model as it ships, which is what they may uncover; those
    on patch tokens take networks that are an encoder with a head.
    """
    if algorithm == "prompts":
        return row is session.default and can_change_prompts(session, row)
    if algorithm == "rays":
        return row is session.default
    if algorithm == "patch_tokens":
        return not row.fused and row.kind is not RowKind.UNDEFENDED and has_encoder(session, row)
    return True


def attacked_rows(session: Session) -> list[Row]:
    """The rows without those that answer like an earlier one."""
    return [row for row in session.rows if session.equivalent_row(row) is None]


def has_adaptive(session: Session) -> bool:
    """Whether the model as it ships fuses several branches, which adaptive attacks aim at."""
    return session.subject.fusion is not None and session.default.fused


def _below_default(session: Session, row: Row) -> bool:
    """Whether a rule is below the model as it ships already: attacks of its own could only lower it further."""
    own, best = (int(session.still_right(which).sum()) for which in (row, session.default))
    return own < best


def own_attack(session: Session, algorithm: str, *, steps: int | None = None, epsilon: float | None = None) -> Attack:
    """Return the attack that a row faces on its own, by name of ``OWN_ATTACKS``."""
    settings = session.settings
    budget = settings.epsilon if epsilon is None else epsilon
    count, restarts, norm = steps or settings.steps, settings.restarts, settings.norm
    attacks: dict[str, Callable[[], Attack]] = {
        "pgd_quick": lambda: PGD(epsilon=budget, norm=norm, steps=min(count, QUICK_STEPS), loss="margin"),
        "pgd_momentum": lambda: MomentumPGD(
            epsilon=budget, norm=norm, steps=2 * count, restarts=restarts, loss="margin"
        ),
        "apgd_ce": lambda: APGD(epsilon=budget, norm=norm, steps=count, restarts=restarts, loss="ce"),
        "prompts": lambda: APGD(epsilon=budget, norm=norm, steps=count, loss="margin", stop_when_wrong=False),
        "patch_tokens": lambda: MomentumIterative(epsilon=budget, norm=norm, steps=count, loss="feature_cosine"),
        "rays": lambda: RayS(epsilon=budget, queries=settings.square_queries),
        "pgd": lambda: PGD(epsilon=budget, norm=norm, steps=count, restarts=restarts, loss="margin"),
        "pgd_from_t1": lambda: PGD(epsilon=budget, norm=norm, steps=count, loss="margin"),
        "apgd": lambda: APGD(epsilon=budget, norm=norm, steps=count, restarts=restarts, loss="margin"),
        "apgd_targeted": lambda: APGD(
            epsilon=budget, norm=norm, steps=count, restarts=1, loss="targeted", targets=settings.targets
        ),
        "square": lambda: Square(epsilon=budget, queries=settings.square_queries),
    }
    return attacks[algorithm]()


def attack_batches(
    session: Session, attack: Attack, view: BranchView, index: Tensor, purpose: str, start: Perturbation | None = None
) -> Tensor:
    """Return attacked versions of the test images at ``index`` (k,), made in batches: (k, 3, H, W).

    Every finished batch is kept under the name of its ``purpose`` until the stage is finished. Processes share the
    batches.
    """

    def work(batch: int, rows: Tensor) -> Tensor:
        images, labels = session.images[rows].to(session.device), session.labels[rows].to(session.device)
        begin = None if start is None else start(images)
        generator = session.generator(purpose, batch)
        return attack(view, images, labels, generator=generator, start=begin).cpu()

    batches = enumerate(index.split(session.settings.batch_size) if len(index) else ())
    works = [partial(session.batch, purpose, batch, partial(work, batch, rows)) for batch, rows in batches]
    return torch.cat([session.images[:0], *session.processes.shared(works)])


def attack_and_add(
    session: Session,
    threat: ThreatModel,
    name: tuple[str, str, str],
    attack: Attack,
    view: BranchView,
    mask: Tensor,
    start: Perturbation | None = None,
) -> None:
    """Attack the images of a (n,) mask as one stage; ``name`` is the attack as shown, its algorithm and its target."""
    shown, algorithm, target = name

    def work() -> dict[str, Tensor]:
        attacked = attack_batches(session, attack, view, mask.nonzero()[:, 0], shown, start)
        return {"logits": session.score(attacked, mask), "attacked": mask}

    found = session.stage(f"{threat} {shown}", work)
    session.add(
        Example(
            threat.key,
            shown,
            attack.epsilon,
            found["logits"],
            found["attacked"].bool(),
            float(found["seconds"]),
            norm=attack.norm,
            algorithm=algorithm,
            target=target,
        )
    )


def _attack_pool(session: Session, pool: PoolAttack) -> None:
    """An attack of the pool, run to its last step on every image that one of its rows still gets right."""
    settings = session.settings
    mask = torch.stack([session.still_right(row) for row in pool.rows]).any(0)
    attack = PGD(
        epsilon=settings.epsilon, norm=settings.norm, steps=settings.steps, loss="margin", stop_when_wrong=False
    )
    name = (attack_name("pgd", pool.target), "pgd", pool.target)
    attack_and_add(session, T2, name, attack, session.branch_view(pool.members), mask)


def _attack_row(session: Session, row: Row, algorithm: str) -> None:
    """A row's own attack, on the images that it got right so far."""
    shown = attack_name(algorithm, row.name) + ("" if row.fused else ":own")  # the pool holds the branch's plain name
    start = None
    if algorithm == "pgd_from_t1":  # the last one was made on the most encoders
        start = _at_white_box_budget(session, list(session.deltas.values())[-1])
    name = (shown, algorithm, row.name)
    attack, view, mask = own_attack(session, algorithm), session.view(row), session.still_right(row)
    if algorithm == "prompts":
        view = with_prompts(session, row)
    elif algorithm == "patch_tokens":
        view = on_patch_tokens(session, row)
        mask = torch.stack([session.still_right(other) for other in (row, *session.fused_rows)]).any(0)
    attack_and_add(session, T2, name, attack, view, mask, start)


def fused_attack(loss: str, fuse: Fuse, steps: int, **changes: Any) -> FusedAttack:
    """The attack with a loss on a fusion, by the optimiser that suits the loss.

    Args:
        loss: of ``FUSED_LOSSES``.
        fuse: the fusion, as the model's ``fuse``.
        steps: gradient steps of other attacks; the loss may take a multiple of them.
        changes: other fields of the attack, such as ``epsilon``.
    """
    driver, factor = DRIVEN.get(loss, ("apgd", 1))
    return FusedAttack(fuse=fuse, loss=loss, steps=factor * steps, driver=driver, **changes)


def _attack_fusion(session: Session, loss: str) -> None:
    """An attack that knows the parts of the model as it ships, on the images that it still gets right."""
    settings, row = session.settings, session.default
    attack = fused_attack(
        loss,
        session.fusion,
        settings.steps,
        epsilon=settings.epsilon,
        norm=settings.norm,
        restarts=max(settings.restarts, settings.fused_restarts),
    )
    name = (attack_name(loss, row.name), loss, row.name)
    attack_and_add(session, T2, name, attack, session.fusion_inputs(), session.still_right(row))


def _attack_superclass(session: Session) -> None:
    """An attack on the model as it ships for answers outside the superclass of the true class."""
    settings, row = session.settings, session.default
    attack = SuperclassAttack(
        fuse=session.fusion,
        groups=settings.superclasses,
        epsilon=settings.epsilon,
        norm=settings.norm,
        steps=2 * settings.steps,
    )
    name = (attack_name("superclass", row.name), "superclass", row.name)
    attack_and_add(session, T2, name, attack, session.fusion_inputs(), session.still_right(row))


def _score_rescaled(session: Session, algorithm: str, target: str, delta: Tensor) -> None:
    """A universal perturbation at T2's budget, in the pool: transfer must not beat the white-box attack."""
    perturbation, name = _at_white_box_budget(session, delta), attack_name(algorithm, target)
    mask = session.scope(T2)
    found = session.stage(f"{T2} {name}", lambda: {"logits": session.score(perturbation(session.images[mask]), mask)})
    session.add(replace(on_all_images(session, T2, algorithm, target, found), attacked=mask))


def _at_white_box_budget(session: Session, delta: Tensor) -> Perturbation:
    """The pattern of a universal perturbation, as large as T2 allows."""
    settings = session.settings
    if settings.norm == "linf":
        return Perturbation(delta, settings.epsilon_universal).rescaled(settings.epsilon)
    return Perturbation.fit_budget(delta * (settings.epsilon / delta.norm().clamp_min(1e-12)), settings.epsilon, "l2")


# ---- T3: the detector as well --------------------------------------------------------------------------------


def run_detector_aware(session: Session) -> None:
    """T3: wrong and not flagged. Each attack continues with the images for which no example so far achieves that."""
    for mode in session.settings.evasion:
        broken = torch.zeros(len(session.labels), dtype=torch.bool)
        for example in session.examples:
            if example.threat in (CLEAN.key, *T3.counts):
                broken |= evades_detector(session, example.logits)
        _evade_detector(session, mode, ~broken & session.scope(T3))


def count_detector_aware(session: Session) -> int:
    """Number of stages of :func:`run_detector_aware`."""
    return len(session.settings.evasion)


def evades_detector(session: Session, logits: Tensor) -> Tensor:
    """(n,) bool: the model as it ships is wrong, and its suspicion score does not exceed the threshold."""
    decision = session.fusion(session.branch_logits(logits))
    return (decision.logits.argmax(-1) != session.labels) & (decision.score <= session.threshold)


def _evade_detector(session: Session, mode: str, mask: Tensor) -> None:
    settings, fusion, row = session.settings, session.fusion, session.default
    clean = fusion(session.branch_logits(session.clean.logits))
    attack = DetectorAware(
        fuse=fusion,
        score=lambda logits: fusion(logits).score,
        threshold=session.threshold,
        spread=max(float(clean.score.std()) if len(session.labels) > 1 else 0.0, 1e-6),
        mode=mode,
        epsilon=settings.epsilon,
        norm=settings.norm,
        steps=settings.detector_steps,
    )
    name = (attack_name(mode, row.name), mode, row.name)
    attack_and_add(session, T3, name, attack, session.fusion_inputs(), mask)


# ---- without trust in the benign branches ----------------------------------------------------------------------


def certified_accuracy(session: Session) -> dict[str, float] | None:
    """Return, by threat model, the share of images answered right and certified so, on the clean and all T2 examples.

    "T2" is the accuracy against all examples found if the attacker could also choose the answers of the benign
    branches (the margin certificate of the fusion). None where the rule allows no certificate.
    """
    if session.subject.fusion is None:
        return None
    held, shares = torch.ones(len(session.labels), dtype=torch.bool), {}
    for example in session.examples:
        if example.control or example.threat not in (CLEAN.key, T2.key):
            continue
        logits = session.branch_logits(example.logits)
        certified = session.fusion.certified(logits)
        if certified is None:
            return None
        held &= certified & (session.fusion(logits).logits.argmax(-1) == session.labels)
        shares[example.threat] = float(held[: session.count(THREATS[example.threat])].float().mean())
    return shares
