"""Which fusion rule, with which constants? Decided on validation pictures, by attack, never on test pictures.

The trade is measured, not assumed: a rule that trusts the benign branch more is right more often on clean pictures and
falls sooner to an attacker who knows everything. Among the rules that hold, under a pool of examples shared by all of
them and under their own attack, within ``tolerance`` of the best single robust branch, the one with the highest clean
accuracy is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zepad_mm.attacks import PGD
from zepad_mm.data import LabelledImages
from zepad_mm.detection import SCORES, threshold_at
from zepad_mm.fusion import build
from zepad_mm.model import DetectorConfig, ZePAD

GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "rfdm": {"k": (0.0, 1.0, 3.0)},
    "rfdm_probability": {"k": (0.0, 1.0, 3.0)},
    "equal": {},
    "entropy": {},
    "bounded_benign": {"benign_weight": (0.0, 0.1, 0.15, 0.2, 0.25, 0.35), "sharpness": (1.0, 2.0)},
    "capped_rfdm": {"cap": (0.15, 0.25, 0.35)},
    "mixed_nuts": {"benign_weight": (0.2, 0.35, 0.45), "power": (1.0, 2.0), "scale": (2.0, 4.0)},
}
OWN_ATTACKS = 6  # about as many candidates are attacked through their own output


@dataclass(frozen=True)
class Candidate:
    """One rule with its constants and what it reached on validation; accuracies in [0, 1].

    Attributes:
        clean: accuracy on clean pictures.
        pool: accuracy on the worst of the shared adversarial examples; ``own``: and of its own attack, where run.
    """

    rule: str
    params: dict[str, float]
    clean: float
    pool: float
    own: float | None = None


@dataclass(frozen=True)
class Selection:
    """What was chosen, against what, and everything that was tried."""

    chosen: Candidate
    branches: dict[str, dict[str, float]]  # name -> clean and pool accuracy of each branch alone
    tried: list[Candidate] = field(default_factory=list)
    n: int = 0
    epsilon: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, ready for JSON."""
        return asdict(self)


def select_fusion(
    model: ZePAD,
    data: LabelledImages,
    *,
    epsilon: float = 4 / 255,
    steps: int = 10,
    tolerance: float = 0.02,
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
    names = list(model.branches)
    robust = [index for index, benign in enumerate(model.benign) if not benign]
    if not robust:
        raise ValueError("select_fusion: the model has no mpae branch, so there is no robustness to keep")
    images, labels = data.images, data.labels
    generator = torch.Generator().manual_seed(seed)
    views: dict[str, Callable[[Tensor], Tensor]] = {name: model.branch(name) for name in names}
    views["robust branches"] = lambda x: torch.stack([model.branch(names[i])(x) for i in robust])
    views["all branches"] = model.branch_logits
    attack = PGD(epsilon=epsilon, steps=steps, loss="margin")
    logits = [_branch_logits(model, images)]
    for name, view in (bar := tqdm(views.items(), desc="validation attacks", leave=False)):
        bar.set_postfix_str(name)
        logits.append(_branch_logits(model, _attack_in_batches(attack, view, images, labels, generator)))
    clean, pool = logits[0], logits  # the clean picture is an example too: robust means right on it as well

    branches = {
        name: {"clean": _accuracy(clean[i], labels), "pool": _worst([z[i] for z in pool], labels)}
        for i, name in enumerate(names)
    }
    tried = []
    for rule, grid in GRIDS.items():
        for values in product(*grid.values()):
            params = dict(zip(grid, values, strict=True))
            fusion = build(rule, model.benign, params=params)
            fused = [fusion(z).logits for z in pool]
            tried.append(Candidate(rule, params, _accuracy(fused[0], labels), _worst(fused, labels)))
    floor = max(branches[names[i]]["pool"] for i in robust) - tolerance
    holding = sorted((c for c in tried if c.pool >= floor), key=lambda c: (c.clean, c.pool), reverse=True)
    # neighbours on this list fall together, so a few spread over all of it are attacked, the most accurate first
    finalists = holding[:: max(1, len(holding) // OWN_ATTACKS)] or [max(tried, key=lambda c: c.pool)]
    chosen = finalists[-1]
    for candidate in tqdm(finalists, desc="own attacks of the best", leave=False):
        chosen = _with_own_attack(model, candidate, pool, (images, labels), attack, generator)
        tried[tried.index(candidate)] = chosen
        if chosen.own is not None and chosen.own >= floor:
            break
    else:
        chosen = max((c for c in tried if c.own is not None), key=lambda c: c.own or 0.0)
    model.set_fusion(chosen.rule, **chosen.params)
    return Selection(chosen, branches, tried, len(data), epsilon)


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
    clean, attacked = _branch_logits(model, validation.images), _branch_logits(model, suspicious)
    caught, thresholds = {}, {}
    for name in SCORES:
        score = SCORES.get(name)
        thresholds[name] = threshold_at(score(clean, model.benign), false_positive_rate)
        caught[name] = float((score(attacked, model.benign) > thresholds[name]).float().mean())
    best = max(caught, key=lambda name: caught[name])
    model.set_detector(DetectorConfig(score=best, threshold=thresholds[best], false_positive_rate=false_positive_rate))
    return caught


def _with_own_attack(
    model: ZePAD,
    candidate: Candidate,
    pool: list[Tensor],
    data: tuple[Tensor, Tensor],
    attack: PGD,
    generator: torch.Generator,
) -> Candidate:
    """The candidate after an attack through its own fused output on what the pool left standing."""
    images, labels = data
    fusion = build(candidate.rule, model.benign, params=candidate.params)
    alive = torch.stack([fusion(z).logits.argmax(-1) == labels for z in pool]).all(0).nonzero().squeeze(1)

    def through(x: Tensor) -> Tensor:
        return fusion(model.branch_logits(x)).logits

    attacked = _attack_in_batches(attack, through, images[alive], labels[alive], generator)
    held = fusion(_branch_logits(model, attacked)).logits.argmax(-1) == labels[alive]
    return Candidate(candidate.rule, candidate.params, candidate.clean, candidate.pool, float(held.sum()) / len(labels))


def _attack_in_batches(
    attack: PGD, view: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    parts = [attack(view, x, y, generator=generator) for x, y in zip(images.split(128), labels.split(128), strict=True)]
    return torch.cat(parts) if parts else images


@torch.no_grad()
def _branch_logits(model: ZePAD, images: Tensor) -> Tensor:
    if len(images) == 0:
        return torch.zeros(len(model.branches), 0, len(model.class_names))
    return torch.cat([model.branch_logits(part) for part in images.split(256)], dim=1)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean())


def _worst(logits: list[Tensor], labels: Tensor) -> float:
    return float(torch.stack([z.argmax(-1) == labels for z in logits]).all(0).float().mean())
