"""The attacks of the table: what the authors used, the adaptive attack, and the scoring of random defences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reproduction.cross_defence.base import Defence, Parts, Path, mean_answer
from zepad_mm.attacks import APGD, PGD, Attack, MomentumIterative, MomentumPGD
from zepad_mm.utils.config import Config
from zepad_mm.utils.seeding import derived_generator

# key of a base.AuthorsAttack -> in words
AUTHORS = {
    "pgd_undefended": "PGD on the undefended CLIP",
    "apgd_undefended": "APGD on the undefended CLIP",
    "apgd_defence": "the cross-entropy through the defence",
    "universal": "universal perturbations, as T1",
}


@dataclass(frozen=True, kw_only=True)
class Strength(Config):
    """How strong the attacks are, and how random defences are scored."""

    steps: int = 25  # of APGD on the cross-entropy
    opening_steps: int = 6  # of a first, short APGD where the full one cannot end early
    margin_steps: int = 100  # of momentum PGD on the margin, on defences without randomness
    random_steps: int = 30  # of the momentum iterative method, through randomness
    target_steps: int = 15  # of APGD-T, for each target
    targets: int = 2  # wrong classes of APGD-T
    mora_steps: int = 8  # of each of the five runs of MORA, on fusions
    pgd_steps: int = 10  # of PGD on the undefended CLIP
    draws: int = 3  # answers of a random defence to each example; the accuracy is their mean
    capacity: int = 400  # images in the encoder at once


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


def transferred(parts: Parts, images: Tensor, labels: Tensor, epsilon: float, strength: Strength) -> dict[str, Tensor]:
    """Examples made without the defence, tried on every one of them; each attack runs to its last step.

    The undefended CLIP is what most authors of test-time defences attack. The robust encoder, and both encoders at
    once, are the parts of every fusion, whose gradient its rule may hide.
    """

    def both(images: Tensor) -> Tensor:
        return mean_answer(parts.undefended(images), parts.robust(images))

    ce = APGD(epsilon=epsilon, steps=strength.steps, loss="ce", stop_when_wrong=False)
    dlr, pgd = replace(ce, loss="dlr"), PGD(epsilon=epsilon, steps=strength.pgd_steps, loss="ce", stop_when_wrong=False)
    attacks: dict[str, tuple[Attack, Path]] = {
        "pgd_undefended": (pgd, Path("undefended", parts.undefended)),
        "apgd_undefended": (dlr, Path("undefended", parts.undefended)),
        "apgd_robust": (ce, Path("robust", parts.robust)),
        "apgd_both": (ce, Path("both", both, views=2)),
    }
    return {
        name: attack_in_batches(attack, path, images, labels, strength.capacity, name)
        for name, (attack, path) in attacks.items()
    }


class Search:
    """The worst example found so far for each image; every attack takes the images that are still answered right.

    Attributes:
        worst: (B, 3, H, W) examples.
        right: (B,) share of answers to them that are right, in [0, 1]; 0 or 1 for a defence without randomness.
        after: accuracy after each attack in turn, by its name.
    """

    def __init__(self, defence: Defence, images: Tensor, labels: Tensor, strength: Strength) -> None:
        self.defence, self.images, self.labels, self.strength = defence, images, labels, strength
        self.worst, self.right = images.clone(), share_right(defence, images, labels, strength)
        self.after: dict[str, float] = {}

    def look(self, name: str, examples: Callable[[Tensor], Tensor]) -> None:
        """Score the examples of the images (M,) that are still right, and keep those that are worse."""
        rows = self.right.nonzero()[:, 0]
        if len(rows) == 0:
            return
        made, labels = examples(rows), self.labels[rows]
        found = share_right(self.defence, made, labels, self.strength)
        gone = (found == 0).nonzero()[:, 0]
        if self.defence.random and len(gone):  # one unlucky answer does not end the search
            again = share_right(self.defence, made[gone], labels[gone], self.strength)
            found[gone] = again / 2  # the mean with the answers that were all wrong
        better = found < self.right[rows]
        self.worst[rows[better]], self.right[rows[better]] = made[better], found[better]
        self.after[name] = float(self.right.mean())

    def attack(self, name: str, attack: Attack, path: Path) -> None:
        """Attack along a path, from the clean images."""

        def examples(rows: Tensor) -> Tensor:
            images, labels = self.images[rows], self.labels[rows]
            return attack_in_batches(attack, path, images, labels, self.strength.capacity, name)

        self.look(name, examples)

    def exact(self, path: Path) -> bool:
        """Whether an image that is wrong along the path is wrong for the defence."""
        return path.exact and not self.defence.random

    def ascend(self, path: Path, epsilon: float) -> None:
        """Raise the cross-entropy along a path: by APGD, or by summed gradients where noise would halt its steps.

        It ends an image early only where the path answers as the defence does; elsewhere a short APGD comes first,
        which leaves the full attack fewer images.
        """
        early, strength = self.exact(path), self.strength
        apgd = APGD(epsilon=epsilon, steps=strength.steps, loss="ce", stop_when_wrong=early)
        summed = MomentumIterative(epsilon=epsilon, steps=strength.random_steps, loss="ce", stop_when_wrong=False)
        if not early:
            self.attack(f"{path.name}, ce, short", replace(apgd, steps=strength.opening_steps), path)
        self.attack(f"{path.name}, ce", summed if self.defence.random else apgd, path)


def authors_attack(
    defence: Defence, images: Tensor, labels: Tensor, epsilon: float, strength: Strength, made: Mapping[str, Tensor]
) -> Tensor:
    """The examples (B, 3, H, W) of the attack that the authors of a defence used.

    Args:
        made: the examples of :func:`transferred`, and those of universal perturbations under "universal".
    """
    if defence.attack in made:
        return made[defence.attack]
    search = Search(defence, images, labels, strength)
    search.ascend(defence.paths()[0], epsilon)
    return search.worst


def adaptive_attack(
    defence: Defence, images: Tensor, labels: Tensor, epsilon: float, strength: Strength, made: Mapping[str, Tensor]
) -> Search:
    """The worst case over all examples that are there already, and attacks along every path of the defence.

    The cross-entropy rises on every path; momentum PGD on the margin and APGD-T follow on the first where nothing is
    random, and MORA on fusions of logits. What the authors' attack found along the first path is not repeated. The
    worst example of each image is chosen by some answers of a random defence and scored by new ones, so that the choice
    does not count as an attack.
    """
    search = Search(defence, images, labels, strength)
    for name, examples in made.items():
        search.look(name, examples.__getitem__)
    first, *others = defence.paths()
    if not ("authors" in made and defence.attack == "apgd_defence"):
        search.ascend(first, epsilon)
    if search.exact(first):  # through a gate, only a long run on the margin comes near the end
        search.attack(f"{first.name}, momentum", MomentumPGD(epsilon=epsilon, steps=strength.margin_steps), first)
    if not defence.random:
        targeted = APGD(
            epsilon=epsilon,
            steps=strength.target_steps,
            loss="targeted",
            targets=strength.targets,
            stop_when_wrong=search.exact(first),
        )
        search.attack(f"{first.name}, targeted", targeted, first)
    for path in others:
        search.ascend(path, epsilon)
    for further in defence.further_attacks(epsilon, strength.mora_steps):
        search.attack(further.name, further.attack, Path(further.name, further.model, views=further.views))
    if defence.random:
        search.right = share_right(defence, search.worst, labels, strength)
        search.after["scored by new answers"] = float(search.right.mean())
    return search
