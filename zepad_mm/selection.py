"""Select the fusion rule, its constants and the detector on validation images, by attack, never on test images.

A rule that trusts the benign branch more has a higher clean accuracy and a lower accuracy under a white-box attack. All
rules are scored on a shared pool of adversarial examples made on the branches. The most promising rules are then
attacked through their own output, and these examples join the pool, so that a rule which merely masks its gradients is
scored on the examples found through the others. Of the rules that are at least as robust on the whole pool as the best
single robust branch, the one with the highest clean accuracy is selected.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zepad_mm.attacks import PGD
from zepad_mm.data import LabelledImages
from zepad_mm.encoders import optimize_for_inference
from zepad_mm.evaluation.subjects import BranchView
from zepad_mm.models.detection import SCORES, score_names, threshold_at
from zepad_mm.models.fusion import GATED_RULE, Fusion, build, rule_names
from zepad_mm.models.zepad import DetectorConfig, ZePAD
from zepad_mm.utils.seeding import seeded_generator

log = logging.getLogger(__name__)

GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "rfdm": {"k": (0.0, 1.0, 3.0)},
    "rfdm_probability": {"k": (0.0, 1.0, 3.0)},
    "equal": {},
    "entropy": {},
    "bounded_benign": {"benign_weight": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35), "sharpness": (1.0, 1.5, 2.0)},
    "capped_rfdm": {"cap": (0.15, 0.25, 0.35)},
    "mixed_nuts": {"benign_weight": (0.2, 0.35, 0.45), "power": (1.0, 2.0), "scale": (2.0, 4.0)},
    "gated": {"cap": (0.25, 0.35, 0.45, 0.6, 0.8, 1.0)},
}
CAPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of "zero_sacrifice", from the highest
LOST = 0.01  # of the undefended accuracy of a validation set, that "zero_sacrifice" may cost
FINALISTS = 8  # candidates, from the most accurate to the most robust, that are attacked through their own output
CONTENDERS = 8  # further candidates at most, the most accurate first, while the pool leaves them robust enough


@dataclass(frozen=True)
class Candidate:
    """A rule with its constants and its accuracies on validation images, in [0, 1].

    Attributes:
        clean: accuracy on clean images.
        pool: robust accuracy over the examples made on the branches.
        shared: robust accuracy over these and the examples made on every finalist; NaN before it is known.
        attacked: whether it was a finalist, that is, attacked through its own output.
    """

    rule: str
    params: dict[str, float]
    clean: float
    pool: float
    shared: float = math.nan
    attacked: bool = False

    @property
    def key(self) -> str:
        """The rule with its constants, as text."""
        return f"{self.rule} {self.params}"


@dataclass(frozen=True)
class Selection:
    """The selected candidate, the branches it is compared with, and every candidate."""

    chosen: Candidate
    branches: dict[str, dict[str, float]]  # name -> clean, pool and shared accuracy of each branch alone
    tried: list[Candidate]
    n: int
    epsilon: float
    steps: int
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)


def select_fusion(
    model: ZePAD,
    data: LabelledImages,
    *,
    epsilon: float = 4 / 255,
    steps: int = 10,
    tolerance: float = 0.0,
    seed: int = 0,
) -> Selection:
    """Score every rule of :data:`GRIDS` on validation data and set the best one on ``model``, in place.

    Args:
        model: with its branches tuned.
        data: validation images.
        epsilon: L-inf budget of the white-box attacker, in pixels of [0, 1].
        steps: of each PGD run.
        tolerance: how far below the best robust branch a rule may be, in robust accuracy.
        seed: of the attacks.

    Raises:
        ValueError: the model has no robust branch to compare with.
    """
    robust = [index for index, benign in enumerate(model.benign) if not benign]
    if not robust:
        raise ValueError("select_fusion: the model has no robust branch, so there is no robustness to keep")
    pool = _AttackPool(model, data, PGD(epsilon=epsilon, steps=steps, loss="margin"), seed)
    views: dict[str, Callable[[Tensor], Tensor]] = dict(zip(model.branches, pool.branches, strict=True))
    views["robust branches"] = BranchView([pool.branches[index] for index in robust])
    views["all branches"] = BranchView(pool.branches)
    for name, view in (bar := tqdm(views.items(), desc="validation attacks", leave=False)):
        bar.set_postfix_str(name)
        pool.attack_all(view)
    rules, tried = _score_candidates(pool, model)
    single_branches = [_single_branch(index) for index in range(len(pool.branches))]
    branches = {
        name: {"clean": pool.clean_accuracy(rule), "pool": pool.robust_accuracy(rule)}
        for name, rule in zip(model.branches, single_branches, strict=True)
    }
    chosen, tried = _attack_finalists(pool, tried, rules, [single_branches[index] for index in robust], tolerance)
    for name, rule in zip(model.branches, single_branches, strict=True):
        branches[name]["shared"] = pool.robust_accuracy(rule)
    model.set_fusion(chosen.rule, **chosen.params)
    return Selection(chosen, branches, tried, len(data), epsilon, steps, tolerance)


def _score_candidates(pool: _AttackPool, model: ZePAD) -> tuple[dict[str, FusionRule], list[Candidate]]:
    """Every rule of :data:`GRIDS` with every choice of constants, by its key, and its accuracies on the pool."""
    rules, tried, gate = {}, [], model.config.gate
    known = rule_names(gate is not None and gate.threshold is not None)
    for name, grid in ((name, grid) for name, grid in GRIDS.items() if name in known):
        for values in product(*grid.values()):
            params = dict(zip(grid, values, strict=True))
            rule = _fused(build(name, model.benign, params=params, gate=gate))
            candidate = Candidate(name, params, pool.clean_accuracy(rule), pool.robust_accuracy(rule))
            rules[candidate.key] = rule
            tried.append(candidate)
    return rules, tried


def _attack_finalists(
    pool: _AttackPool, tried: list[Candidate], rules: dict[str, FusionRule], robust: list[FusionRule], tolerance: float
) -> tuple[Candidate, list[Candidate]]:
    """Attack finalists until the most accurate candidate that is robust enough has been attacked itself."""

    def floor() -> float:
        return max(pool.robust_accuracy(rule) for rule in robust) - tolerance

    queue = _choose_finalists(tried, floor())
    attacked: set[str] = set()
    with tqdm(total=len(queue) + CONTENDERS, desc="attacks through the finalists", leave=False) as bar:
        while True:
            for candidate in queue:
                pool.attack_survivors(rules[candidate.key])
                attacked.add(candidate.key)
                bar.update()
            tried = [replace(c, shared=pool.robust_accuracy(rules[c.key]), attacked=c.key in attacked) for c in tried]
            best = sorted((c for c in tried if c.shared >= floor()), key=lambda c: (c.clean, c.shared), reverse=True)
            # a candidate is selected only after an attack through its own output
            if not best or best[0].attacked or bar.n >= bar.total:
                break
            queue = best[:1]
    tested = [c for c in tried if c.attacked]
    return next((c for c in best if c.attacked), max(tested, key=lambda c: c.shared)), tried


def select_policies(
    model: ZePAD, selection: Selection, sets: Sequence[LabelledImages] = (), tolerance: float = 0.01
) -> dict[str, float]:
    """Set the rule "gated" with a cap of the benign weight for each policy, in place; "zero_sacrifice" is in use.

    "zero_sacrifice" has the lowest cap that costs no clean accuracy on ``sets``: below 1 the robust branches decide
    where the benign ones are unsure, as under an attack that stops at the first wrong answer. It is 1 without several
    sets: on a single one the robust branches may be better than elsewhere. "white_box" has the highest cap that is as
    robust as the best robust branch; 0 where none is.

    Args:
        model: with a calibrated gate, as it was when the rules were scored.
        selection: of :func:`select_fusion`.
        sets: validation images of several kinds under their own class names, for models with a text tower.
        tolerance: how far below the best robust branch the cap of "white_box" may be, in robust accuracy.

    Returns:
        policy -> cap.
    """
    names = [name for name, benign in zip(model.branches, model.benign, strict=True) if not benign]
    floor = max(selection.branches[name]["shared"] for name in names) - tolerance
    gated = [candidate for candidate in selection.tried if candidate.rule == GATED_RULE]
    kept = [candidate.params["cap"] for candidate in gated if candidate.shared >= floor]
    caps = {"zero_sacrifice": _harmless_cap(model, sets), "white_box": max(kept, default=0.0)}
    model.config = replace(model.config, policy="zero_sacrifice", policy_caps=caps)
    model.set_fusion(GATED_RULE)
    return caps


def _harmless_cap(model: ZePAD, sets: Sequence[LabelledImages]) -> float:
    """:func:`harmless_cap` on sets under their own class names; 1 without several."""
    if len(sets) < 2:
        return 1.0
    own = model.config.class_names
    lost = [accuracy_lost(model.set_classes(data.class_names), data) for data in sets]
    model.set_classes(own)
    return harmless_cap(lost)


def accuracy_lost(model: ZePAD, data: LabelledImages) -> list[float]:
    """What the rule "gated" loses of the accuracy of the first benign branch on clean images, for each of ``CAPS``."""
    logits = _in_batches(model.branch_logits, data.images)
    rules = [build(GATED_RULE, model.benign, params={"cap": cap}, gate=model.config.gate) for cap in CAPS]
    answers = [logits[model.benign.index(True)], *(rule(logits).logits for rule in rules)]
    undefended, *found = (float((answer.argmax(-1) == data.labels).float().mean()) for answer in answers)
    log.info("%s: undefended %.3f, by cap %s %s", data.name, undefended, CAPS, [round(one, 3) for one in found])
    return [undefended - accuracy for accuracy in found]


def harmless_cap(lost: Sequence[Sequence[float]]) -> float:
    """The lowest cap with which no set loses more than ``LOST`` of its undefended accuracy, and the mean none of it.

    ``lost`` is :func:`accuracy_lost` of each set. 1 where there is no such cap.
    """
    harmless = [cap for cap, found in zip(CAPS, zip(*lost, strict=True), strict=True) if _harmless(found)]
    return min(harmless, default=1.0)


def _harmless(lost: Sequence[float]) -> bool:
    return max(lost) <= LOST and sum(lost) <= 1e-6  # room for rounding


def select_detector(
    model: ZePAD, validation: LabelledImages, adversarial: Tensor, *, false_positive_rate: float = 0.05
) -> dict[str, float]:
    """Select the score that detects most of ``adversarial`` at a false positive rate, and set its threshold, in place.

    Args:
        validation: clean images, which determine the thresholds.
        adversarial: (N, 3, H, W) attacked validation images.

    Returns:
        the share detected by each score; 0 and no threshold where all branches are the same network.
    """
    clean, attacked = _in_batches(model.branch_logits, validation.images), _in_batches(model.branch_logits, adversarial)
    names, alike = score_names(model.gate is not None), clean[: len(model.benign)]
    if torch.allclose(alike, alike[:1].expand_as(alike), rtol=0, atol=1e-3):
        log.warning("no detector: all branches answer alike, so that no score tells anything; nothing will be flagged")
        model.set_detector(DetectorConfig(threshold=None, false_positive_rate=false_positive_rate))
        return dict.fromkeys(names, 0.0)
    detected, thresholds = {}, {}
    for name in names:
        score = SCORES.get(name)
        thresholds[name] = threshold_at(score(clean, model.benign), false_positive_rate)
        detected[name] = float((score(attacked, model.benign) > thresholds[name]).float().mean())
    best = max(detected, key=lambda name: detected[name])
    model.set_detector(DetectorConfig(score=best, threshold=thresholds[best], false_positive_rate=false_positive_rate))
    return detected


FusionRule = Callable[[Tensor], Tensor]  # branch logits (N, B, C), with the gate's (N + 1, B, C), to fused logits


class _AttackPool:
    """Validation images under attack: the branch logits of all examples found so far, the clean images first.

    With a gate, its logit is one more row.
    """

    def __init__(self, model: ZePAD, data: LabelledImages, attack: PGD, seed: int) -> None:
        self.images, self.labels, self.attack = data.images, data.labels, attack
        self.branches = [optimize_for_inference(model.branch(name), data.images.shape[-1]) for name in model.branches]
        gate = None if model.gate is None else copy.deepcopy(model.gate).requires_grad_(False)
        self.logits_of = BranchView(self.branches, None, gate)
        self.generator = seeded_generator(seed)
        self.examples = [_in_batches(self.logits_of, self.images)]

    def clean_accuracy(self, rule: FusionRule) -> float:
        return float(self._correct(rule, 1).float().mean())

    def robust_accuracy(self, rule: FusionRule) -> float:
        """Share of images whose every example, the clean image included, is classified correctly."""
        return float(self._correct(rule, len(self.examples)).float().mean())

    def attack_all(self, view: Callable[[Tensor], Tensor]) -> None:
        """Attack all images through ``view`` and add the branch logits of the result to the pool."""
        self._attack_rows(view, torch.arange(len(self.labels)))

    def attack_survivors(self, rule: FusionRule) -> None:
        """Attack the images that this rule classifies correctly so far, through its own output."""
        alive = self._correct(rule, len(self.examples)).nonzero().squeeze(1)
        self._attack_rows(lambda images: rule(self.logits_of(images)), alive)

    def _attack_rows(self, view: Callable[[Tensor], Tensor], index: Tensor) -> None:
        logits = self.examples[0].clone()
        for rows in index.split(64) if len(index) else ():
            attacked = self.attack(view, self.images[rows], self.labels[rows], generator=self.generator)
            logits[:, rows] = _in_batches(self.logits_of, attacked)
        self.examples.append(logits)

    def _correct(self, rule: FusionRule, count: int) -> Tensor:
        return torch.stack([rule(z).argmax(-1) == self.labels for z in self.examples[:count]]).all(0)


def _choose_finalists(tried: list[Candidate], floor: float) -> list[Candidate]:
    """The candidates to attack: those robust enough on the pool, from the most accurate to the most robust."""
    best = sorted((c for c in tried if c.pool >= floor), key=lambda c: (c.clean, c.pool), reverse=True)
    if not best:
        return sorted(tried, key=lambda c: c.pool, reverse=True)[:FINALISTS]
    places = torch.linspace(0, len(best) - 1, min(FINALISTS, len(best))).round().int().tolist()
    return [best[place] for place in places]


def _single_branch(index: int) -> FusionRule:
    return lambda logits: logits[index]


def _fused(fusion: Fusion) -> FusionRule:
    return lambda logits: fusion(logits).logits


@torch.no_grad()
def _in_batches(view: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Branch logits (N, B, C) of many images, in batches."""
    return torch.cat([view(part) for part in images.split(128)], dim=1)
