"""Which fusion rule, with which constants? Decided on validation pictures, by attack, never on test pictures.

The trade is measured, not assumed: a rule that trusts the benign branch more is right more often on clean pictures and
falls sooner to an attacker who knows everything. First all rules are scored on a pool of examples made on the branches.
Then the most promising ones are attacked through their own output, and what that finds joins the pool, so that a rule
which merely hides its gradients is judged on what was found through the others. Of those that are no less robust on
all of it than the best single robust branch, the one with the highest clean accuracy is taken.
"""

from __future__ import annotations

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
from zepad_mm.models.detection import SCORES, threshold_at
from zepad_mm.models.fusion import Fusion, build
from zepad_mm.models.zepad import DetectorConfig, ZePAD
from zepad_mm.utils.seeding import seeded_generator

GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "rfdm": {"k": (0.0, 1.0, 3.0)},
    "rfdm_probability": {"k": (0.0, 1.0, 3.0)},
    "equal": {},
    "entropy": {},
    "bounded_benign": {"benign_weight": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35), "sharpness": (1.0, 1.5, 2.0)},
    "capped_rfdm": {"cap": (0.15, 0.25, 0.35)},
    "mixed_nuts": {"benign_weight": (0.2, 0.35, 0.45), "power": (1.0, 2.0), "scale": (2.0, 4.0)},
}
FINALISTS = 8  # so many candidates, from the most accurate to the most robust, are attacked through their own output
CONTENDERS = 8  # and at most so many more, the most accurate first, while the others' examples do not break them


@dataclass(frozen=True)
class Candidate:
    """One rule with its constants and what it reached on validation; accuracies in [0, 1].

    Attributes:
        clean: accuracy on clean pictures.
        pool: accuracy on the worst of the examples made on the branches.
        shared: accuracy on the worst of these and of what was found through every finalist; NaN before that is known.
        attacked: was it a finalist, that is, attacked through its own output?
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
    """What was chosen, against what, and everything that was tried."""

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
    """Try every rule of :data:`GRIDS` on validation data and set the best on ``model``, in place.

    Args:
        model: with its branches tuned.
        data: validation pictures.
        epsilon: L-inf budget of the white-box attacker, in pixels of [0, 1].
        steps: of each PGD run.
        tolerance: how far below the best robust branch a rule may fall, in accuracy.
        seed: of the attacks.

    Raises:
        ValueError: the model has no robust branch to hold on to.
    """
    robust = [index for index, benign in enumerate(model.benign) if not benign]
    if not robust:
        raise ValueError("select_fusion: the model has no robust branch, so there is no robustness to keep")
    field = _Field(model, data, PGD(epsilon=epsilon, steps=steps, loss="margin"), seed)
    views: dict[str, Callable[[Tensor], Tensor]] = dict(zip(model.branches, field.branches, strict=True))
    views["robust branches"] = lambda x: torch.stack([field.branches[index](x) for index in robust])
    views["all branches"] = field.logits_of
    for name, view in (bar := tqdm(views.items(), desc="validation attacks", leave=False)):
        bar.set_postfix_str(name)
        field.strike(view)
    answers, tried = {}, []
    for rule, grid in GRIDS.items():
        for values in product(*grid.values()):
            params = dict(zip(grid, values, strict=True))
            answer = _answer(build(rule, model.benign, params=params))
            tried.append(Candidate(rule, params, field.clean(answer), field.worst(answer)))
            answers[tried[-1].key] = answer
    alone = [_only(index) for index in range(len(field.branches))]
    branches = {
        name: {"clean": field.clean(answer), "pool": field.worst(answer)}
        for name, answer in zip(model.branches, alone, strict=True)
    }
    chosen, tried = _contest(field, tried, answers, [alone[index] for index in robust], tolerance)
    for name, answer in zip(model.branches, alone, strict=True):
        branches[name]["shared"] = field.worst(answer)
    model.set_fusion(chosen.rule, **chosen.params)
    return Selection(chosen, branches, tried, len(data), epsilon, steps, tolerance)


def _contest(
    field: _Field, tried: list[Candidate], answers: dict[str, Answer], robust: list[Answer], tolerance: float
) -> tuple[Candidate, list[Candidate]]:
    """Attack the promising candidates until the most accurate one that still holds has been attacked itself."""

    def floor() -> float:
        return max(field.worst(answer) for answer in robust) - tolerance

    waiting = _spread(tried, floor())
    attacked: set[str] = set()
    with tqdm(total=len(waiting) + CONTENDERS, desc="attacks through the finalists", leave=False) as bar:
        while True:
            for candidate in waiting:
                field.strike_through(answers[candidate.key])
                attacked.add(candidate.key)
                bar.update()
            tried = [replace(c, shared=field.worst(answers[c.key]), attacked=c.key in attacked) for c in tried]
            best = sorted((c for c in tried if c.shared >= floor()), key=lambda c: (c.clean, c.shared), reverse=True)
            # who was not attacked yet must show that it holds before it may be taken
            if not best or best[0].attacked or bar.n >= bar.total:
                break
            waiting = best[:1]
    tested = [c for c in tried if c.attacked]
    return next((c for c in best if c.attacked), max(tested, key=lambda c: c.shared)), tried


def select_detector(
    model: ZePAD, validation: LabelledImages, suspicious: Tensor, *, false_positive_rate: float = 0.05
) -> dict[str, float]:
    """Choose the score that catches most of ``suspicious`` at a false positive rate, and set its threshold, in place.

    Args:
        validation: clean pictures; they fix the thresholds.
        suspicious: (N, 3, H, W) attacked validation pictures.

    Returns:
        the share caught by each score.
    """
    clean, attacked = _in_parts(model.branch_logits, validation.images), _in_parts(model.branch_logits, suspicious)
    caught, thresholds = {}, {}
    for name in SCORES:
        score = SCORES.get(name)
        thresholds[name] = threshold_at(score(clean, model.benign), false_positive_rate)
        caught[name] = float((score(attacked, model.benign) > thresholds[name]).float().mean())
    best = max(caught, key=lambda name: caught[name])
    model.set_detector(DetectorConfig(score=best, threshold=thresholds[best], false_positive_rate=false_positive_rate))
    return caught


Answer = Callable[[Tensor], Tensor]  # branch logits (N, B, C) to the answer (B, C)


class _Field:
    """Validation pictures under attack: the branch logits of every example found so far, the clean ones first."""

    def __init__(self, model: ZePAD, data: LabelledImages, attack: PGD, seed: int) -> None:
        self.images, self.labels, self.attack = data.images, data.labels, attack
        self.branches = [optimize_for_inference(model.branch(name), data.images.shape[-1]) for name in model.branches]
        self.generator = seeded_generator(seed)
        self.examples = [_in_parts(self.logits_of, self.images)]

    def logits_of(self, images: Tensor) -> Tensor:
        return torch.stack([branch(images) for branch in self.branches])

    def clean(self, answer: Answer) -> float:
        return float(self._right(answer, 1).float().mean())

    def worst(self, answer: Answer) -> float:
        """Accuracy where every example counts; the clean picture is one of them."""
        return float(self._right(answer, len(self.examples)).float().mean())

    def strike(self, view: Callable[[Tensor], Tensor]) -> None:
        """Attack all pictures through ``view`` and keep what every branch says to the result."""
        self._add(view, torch.arange(len(self.labels)))

    def strike_through(self, answer: Answer) -> None:
        """Attack what this rule still gets right, through its own output."""
        alive = self._right(answer, len(self.examples)).nonzero().squeeze(1)
        self._add(lambda images: answer(self.logits_of(images)), alive)

    def _add(self, view: Callable[[Tensor], Tensor], index: Tensor) -> None:
        found = self.examples[0].clone()
        for rows in index.split(64) if len(index) else ():
            attacked = self.attack(view, self.images[rows], self.labels[rows], generator=self.generator)
            found[:, rows] = _in_parts(self.logits_of, attacked)
        self.examples.append(found)

    def _right(self, answer: Answer, count: int) -> Tensor:
        return torch.stack([answer(z).argmax(-1) == self.labels for z in self.examples[:count]]).all(0)


def _spread(tried: list[Candidate], floor: float) -> list[Candidate]:
    """Those that hold on the pool, a few spread from the most accurate to the most robust."""
    best = sorted((c for c in tried if c.pool >= floor), key=lambda c: (c.clean, c.pool), reverse=True)
    if not best:
        return sorted(tried, key=lambda c: c.pool, reverse=True)[:FINALISTS]
    places = torch.linspace(0, len(best) - 1, min(FINALISTS, len(best))).round().int().tolist()
    return [best[place] for place in places]


def _only(index: int) -> Answer:
    return lambda logits: logits[index]


def _answer(fusion: Fusion) -> Answer:
    return lambda logits: fusion(logits).logits


@torch.no_grad()
def _in_parts(view: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Branch logits (N, B, C) of many pictures."""
    return torch.cat([view(part) for part in images.split(128)], dim=1)
