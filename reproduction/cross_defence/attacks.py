"""The attacks of the table: what the authors used, the adaptive attack, and the scoring of random defences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reproduction.cross_defence.base import Defence, Path
from zepad_mm.attacks import APGD, PGD, Attack
from zepad_mm.utils.config import Config
from zepad_mm.utils.seeding import derived_generator

# key of a base.AuthorsAttack -> in words
AUTHORS = {
    "pgd_undefended": "PGD on the undefended CLIP",
    "apgd_undefended": "APGD on the undefended CLIP",
    "apgd_defence": "APGD-CE through the defence",
    "universal": "universal perturbations, as T1",
}


@dataclass(frozen=True, kw_only=True)
class Strength(Config):
    """How strong the attacks are, and how random defences are scored."""

    steps: int = 25  # of APGD on the cross-entropy
    target_steps: int = 15  # of APGD-T, for each target
    targets: int = 2  # wrong classes of APGD-T
    mora_steps: int = 8  # of each of the five runs of MORA, on fusions
    pgd_steps: int = 20  # of PGD on the undefended CLIP
    draws: int = 3  # answers of a random defence to each example; the accuracy is their mean
    capacity: int = 400  # images in the encoder at once


@dataclass(frozen=True)
class Found:
    """The worst examples of a defence.

    Attributes:
        right: (B,) share of answers that are right, in [0, 1]; 0 or 1 for a defence without randomness.
        after: accuracy after each attack in turn, by its name.
    """

    right: Tensor
    after: dict[str, float]


def share_right(defence: Defence, images: Tensor, labels: Tensor, strength: Strength) -> Tensor:
    """(B,) the share of a defence's answers that are right, in [0, 1]."""
    draws = strength.draws if defence.random and not defence.averages else 1
    size = max(1, strength.capacity // defence.views)
    with torch.no_grad():
        answers = [torch.cat([defence(few).argmax(-1) for few in images.split(size)]) for _ in range(draws)]
    return torch.stack([answer == labels for answer in answers]).float().mean(0)


def attack_in_batches(attack: Attack, path: Path, images: Tensor, labels: Tensor, size: int, key: str) -> Tensor:
    """Adversarial images (B, 3, H, W); ``size`` images in the encoder at once."""
    size = max(1, size // path.views)
    parts = zip(images.split(size), labels.split(size), strict=True)
    return torch.cat(
        [attack(path.model, *part, generator=derived_generator(key, batch)) for batch, part in enumerate(parts)]
    )


def transferred(
    undefended: nn.Module, images: Tensor, labels: Tensor, epsilon: float, strength: Strength
) -> dict[str, Tensor]:
    """Examples made on the undefended CLIP, as most authors of test-time defences use; each runs to its last step."""
    path = Path("undefended", undefended, exact=False)
    attacks: dict[str, Attack] = {
        "pgd_undefended": PGD(epsilon=epsilon, steps=strength.pgd_steps, loss="ce", stop_when_wrong=False),
        "apgd_undefended": APGD(epsilon=epsilon, steps=strength.steps, loss="dlr", stop_when_wrong=False),
    }
    return {
        name: attack_in_batches(attack, path, images, labels, strength.capacity, name)
        for name, attack in attacks.items()
    }


def authors_attack(
    defence: Defence, images: Tensor, labels: Tensor, epsilon: float, strength: Strength, made: Mapping[str, Tensor]
) -> Tensor:
    """The examples (B, 3, H, W) of the attack that the authors of a defence used.

    Args:
        made: the examples of :func:`transferred`, and those of universal perturbations under "universal".
    """
    if defence.attack in made:
        return made[defence.attack]
    path = defence.paths()[0]
    return attack_in_batches(
        _apgd("ce", path, defence, epsilon, strength), path, images, labels, strength.capacity, "ce"
    )


def _apgd(loss: str, path: Path, defence: Defence, epsilon: float, strength: Strength) -> APGD:
    """APGD-CE or APGD-T along a path; it ends early only where the path answers as the defence does."""
    steps = strength.steps if loss == "ce" else strength.target_steps
    exact = path.exact and not defence.random
    return APGD(epsilon=epsilon, steps=steps, loss=loss, targets=strength.targets, stop_when_wrong=exact)


def adaptive_attack(
    defence: Defence, images: Tensor, labels: Tensor, epsilon: float, strength: Strength, made: Mapping[str, Tensor]
) -> Found:
    """The worst case over all examples that are there already, and APGD along every path of the defence.

    APGD-CE on every path, APGD-T on the first, and MORA on fusions; what the authors' attack found along the first path
    is not repeated. Each attack starts from the clean images that no earlier one broke. The worst example of each image
    is chosen by some answers of a random defence and scored by new ones, so that the choice does not count as an
    attack.
    """
    worst, right, after = images.clone(), share_right(defence, images, labels, strength), {}

    def look(name: str, rows: Tensor, examples: Tensor) -> None:
        found = share_right(defence, examples, labels[rows], strength)
        better = found < right[rows]
        worst[rows[better]], right[rows[better]] = examples[better], found[better]
        after[name] = float(right.mean())

    for name, examples in made.items():
        rows = right.nonzero()[:, 0]
        if len(rows):
            look(name, rows, examples[rows])
    for number, path in enumerate(defence.paths()):
        known = number == 0 and "authors" in made and defence.attack == "apgd_defence"
        for loss in (*(() if known else ("ce",)), *(("targeted",) if number == 0 else ())):
            rows = right.nonzero()[:, 0]
            if len(rows) == 0:
                break
            attack, name = _apgd(loss, path, defence, epsilon, strength), f"{path.name}, {loss}"
            examples = attack_in_batches(attack, path, images[rows], labels[rows], strength.capacity, name)
            look(name, rows, examples)
    for further in defence.further_attacks(epsilon, strength.mora_steps):
        rows = right.nonzero()[:, 0]
        if len(rows):
            path = Path(further.name, further.model, views=further.views)
            examples = attack_in_batches(
                further.attack, path, images[rows], labels[rows], strength.capacity, further.name
            )
            look(further.name, rows, examples)
    if defence.random:
        right = share_right(defence, worst, labels, strength)
    return Found(right, after)
