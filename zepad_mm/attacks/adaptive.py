"""White-box attacks on a fused model, given as two callables: the branch logits and the fusion rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Protocol

import torch
from torch import Tensor

from zepad_mm.attacks.apgd import APGD
from zepad_mm.attacks.base import Attack, Model, frozen
from zepad_mm.attacks.losses import cross_entropy, difference_of_logits_ratio, margin, margin_per_branch
from zepad_mm.attacks.objective import CLEARLY_WRONG, BestAdversarial, Objective, not_clearly_wrong
from zepad_mm.attacks.pgd import PGD, MomentumPGD
from zepad_mm.utils.registry import Registry
from zepad_mm.utils.validation import check_labels


class Fused(Protocol):
    """The output of a fusion rule, e.g. ``zepad_mm.models.fusion.Decision``."""

    @property
    def logits(self) -> Tensor:
        """(B, C)."""

    @property
    def weights(self) -> Tensor:
        """(N, B) weights of the branches for each image."""


# branch logits (N, B, C) to the fused output; a gate's logit may follow them as one more row (N + 1, B, C)
Fuse = Callable[[Tensor], Fused]
Loss = Callable[[Tensor, Tensor], Tensor]  # branch logits (N, B, C) and labels (B,) to losses (B,)

# name -> attack class; it is called with the branches, (B, 3, H, W) to (N, B, C), in place of a model
ADAPTIVE_ATTACKS: Registry[type[BranchedAttack]] = Registry("adaptive attack")

DRIVERS: dict[str, type[APGD] | type[PGD]] = {"apgd": APGD, "pgd": PGD, "momentum": MomentumPGD}

# name -> losses(fuse, number of branches); each loss is maximised in a run of its own
FUSED_LOSSES: Registry[Callable[[Fuse, int], list[Loss]]] = Registry("loss on a fused model")


@dataclass(frozen=True, kw_only=True)
class BranchedAttack(Attack):
    """An attack with losses on the branch logits, whose success is judged on the fused output.

    Raises ValueError, when called, for a model whose outputs are not (N, B, C).
    """

    fuse: Fuse = field(repr=False)  # (N, B, C) to something with logits (B, C) and weights (N, B)
    steps: int = 50  # gradient steps per run
    restarts: int = 1  # the worst over all of them counts
    driver: str = "apgd"  # of DRIVERS: the optimiser of the losses

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fuse):
            raise ValueError(f"fuse: expected a callable on branch logits, e.g. model.fuse, got {self.fuse!r}")
        if self.driver not in DRIVERS:
            raise ValueError(f"driver: expected one of {', '.join(map(repr, DRIVERS))}, got {self.driver!r}")
        self.make_driver()  # checks the steps

    def make_driver(self) -> APGD | PGD:
        """The gradient attack that maximises the losses."""
        return DRIVERS[self.driver](epsilon=self.epsilon, norm=self.norm, steps=self.steps, restarts=self.restarts)

    def run(
        self, model: Model, images: Tensor, labels: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        target = check_labels(labels, images)
        with torch.no_grad():
            outputs = model(images)
            check_branches(outputs, len(images))
            branches = len(self.fuse(outputs).weights)  # what follows them is for the fusion, as the logit of a gate
        objectives = self.objectives(target, branches)
        objectives[0].check(outputs, len(images))
        best = BestAdversarial(images)
        best.update(images, outputs, objectives[0])
        self.make_driver().ascend(model, images, objectives, best, generator, start)
        return best.images

    def still_correct(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad(), frozen(model):
            return self.judge(model(images), labels)[1]

    @abstractmethod
    def objectives(self, labels: Tensor, branches: int) -> list[Objective]:
        """One objective for each run."""

    def judge(self, branch_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The value that images are compared by (b,), and whether each is still correct (b,)."""
        logits = self.fuse(branch_logits).logits
        return margin(logits, labels), not_clearly_wrong(logits, labels)


def check_branches(outputs: Tensor, samples: int) -> None:
    """Raise ValueError for outputs that are not (N, B, C)."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 3 or outputs.shape[1] != samples:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"model: expected the logits of every branch, (N, {samples}, C), got {got}; "
            "pass model.branch_logits, not the fused model"
        )


@ADAPTIVE_ATTACKS.register("fused")
@dataclass(frozen=True, kw_only=True)
class FusedAttack(BranchedAttack):
    """White-box attack on a fused model by one of :data:`FUSED_LOSSES`; success is a wrong fused prediction."""

    loss: str = "fused_margin"  # of FUSED_LOSSES

    def __post_init__(self) -> None:
        super().__post_init__()
        FUSED_LOSSES.get(self.loss)

    def objectives(self, labels: Tensor, branches: int) -> list[Objective]:
        losses = FUSED_LOSSES.get(self.loss)(self.fuse, branches)
        return [Objective(loss, labels, False, judge=self.judge) for loss in losses]


@ADAPTIVE_ATTACKS.register("superclass")
@dataclass(frozen=True, kw_only=True)
class SuperclassAttack(BranchedAttack):
    """White-box attack on a fused model that succeeds with a prediction outside the superclass of the true class."""

    groups: tuple[int, ...]  # the superclass of each of the C classes, e.g. (0, 0, 1)
    driver: str = "momentum"

    def objectives(self, labels: Tensor, branches: int) -> list[Objective]:
        return [Objective(lambda logits, y: self.judge(logits, y)[0], labels, False, judge=self.judge)]

    def judge(self, branch_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.fuse(branch_logits).logits
        if len(self.groups) != logits.shape[-1] or len(set(self.groups)) < 2:
            raise ValueError(
                f"groups: expected the superclass of each of {logits.shape[-1]} classes, at least two different ones, "
                f"got {self.groups}"
            )
        groups = torch.tensor(self.groups, device=logits.device)
        inside = groups == groups[labels][:, None]
        gain = logits.masked_fill(inside, -torch.inf).amax(-1) - logits.masked_fill(~inside, -torch.inf).amax(-1)
        return gain, ~(gain > CLEARLY_WRONG * logits.abs().amax(-1))


# ---- losses through the fusion ---------------------------------------------------------------------------------------


@FUSED_LOSSES.register("fused_margin")
def fused_margin(fuse: Fuse, branches: int) -> list[Loss]:
    """Margin of the fused logits."""
    return [lambda logits, labels: margin(fuse(logits).logits, labels)]


@FUSED_LOSSES.register("fused_ce")
def fused_ce(fuse: Fuse, branches: int) -> list[Loss]:
    """Cross-entropy of the fused logits."""
    return [lambda logits, labels: cross_entropy(fuse(logits).logits, labels)]


@FUSED_LOSSES.register("fused_dlr")
def fused_dlr(fuse: Fuse, branches: int) -> list[Loss]:
    """DLR loss of the fused logits; below 3 classes, where it is undefined, the margin."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        ratio = difference_of_logits_ratio if logits.shape[-1] >= 3 else margin
        return ratio(fuse(logits).logits, labels)

    return [loss]


@FUSED_LOSSES.register("weight_hijack")
def weight_hijack(fuse: Fuse, branches: int) -> list[Loss]:
    """Weighted sum of branch margins: grows with the margin of a wrong branch and with its weight."""
    return [lambda logits, labels: (fuse(logits).weights * margin_per_branch(logits[:branches], labels)).sum(0)]


@FUSED_LOSSES.register("weight_hijack_frozen")
def weight_hijack_frozen(fuse: Fuse, branches: int) -> list[Loss]:
    """The same with detached weights: for fusion rules whose weights mask the gradient."""
    return [
        lambda logits, labels: (fuse(logits).weights.detach() * margin_per_branch(logits[:branches], labels)).sum(0)
    ]


# ---- losses on the branches alone ------------------------------------------------------------------------------------


@FUSED_LOSSES.register("branch")
def branch(fuse: Fuse, branches: int) -> list[Loss]:
    """Each branch alone, one run each."""
    return [_margin_of((index,)) for index in range(branches)]


@FUSED_LOSSES.register("pair")
def pair(fuse: Fuse, branches: int) -> list[Loss]:
    """Each pair of branches, one run each; the single branch where there is no pair."""
    return [_margin_of(pair) for pair in combinations(range(branches), 2)] or [_margin_of((0,))]


@FUSED_LOSSES.register("sum_margin")
def sum_margin(fuse: Fuse, branches: int) -> list[Loss]:
    """Sum of all branch margins."""
    return [_margin_of(range(branches))]


@FUSED_LOSSES.register("min_margin")
def min_margin(fuse: Fuse, branches: int) -> list[Loss]:
    """Smallest branch margin: attacks the most robust branch until all are wrong."""
    return [lambda logits, labels: margin_per_branch(logits[:branches], labels).amin(0)]


@FUSED_LOSSES.register("average_logit")
def average_logit(fuse: Fuse, branches: int) -> list[Loss]:
    """Margin of the mean logits."""
    return [lambda logits, labels: margin(logits[:branches].mean(0), labels)]


@FUSED_LOSSES.register("average_probability")
def average_probability(fuse: Fuse, branches: int) -> list[Loss]:
    """Margin of the log of the mean probability."""
    return [lambda logits, labels: margin(logits[:branches].log_softmax(-1).logsumexp(0), labels)]


MORA_BETAS = (0.5, 0.0, 0.25, 0.75, 1.0)  # share of the re-weighted branches in the loss of each run, in their order


@FUSED_LOSSES.register("mora")
def mora(fuse: Fuse, branches: int) -> list[Loss]:
    """The model-reweighing attack (MORA, Yu et al. 2022): five runs, each with another share of the branches.

    Each loss is the cross-entropy of a mix of the fused logits and of a weighted mean of the branches that are still
    right. A branch weighs as much as its logits move the fused log-ratio of the strongest wrong class to the true one.
    Temperatures set at each step keep the cross-entropy from saturating: the fused logits are divided by the gap of
    their two largest, those of all branches by a tenth of the largest gap of any branch where it exceeds 10. The paper
    drives it with :class:`~zepad_mm.attacks.pgd.MomentumPGD`.
    """
    return [partial(_mora_loss, fuse, beta) for beta in MORA_BETAS]


def _mora_loss(fuse: Fuse, beta: float, outputs: Tensor, labels: Tensor) -> Tensor:
    fused = fuse(outputs)
    logits = outputs[: len(fused.weights)]
    gap, gaps = _top_gap(fused.logits.detach()), _top_gap(logits.detach())
    whole = fused.logits / gap.clamp_min(1e-6).unsqueeze(-1)
    cooled = logits / (gaps.amax(0) / 10).clamp_min(1).view(1, -1, 1)
    weights = mora_weights(fused, logits, labels) * (logits.detach().argmax(-1) == labels)
    shares = weights / weights.sum(0).clamp_min(1e-8)
    return cross_entropy((1 - beta) * whole + beta * (shares.unsqueeze(-1) * cooled).sum(0), labels)


@torch.no_grad()
def mora_weights(fused: Fused, logits: Tensor, labels: Tensor) -> Tensor:
    """(N, B): derivative of log q_r - log q_y by the logit of r in each branch, for the mean q of probabilities p.

    y is the true class, r the strongest wrong one.
    """
    index = labels[:, None]
    rival = fused.logits.scatter(-1, index, -torch.inf).argmax(-1, keepdim=True)
    mean, each = fused.logits.softmax(-1), logits.softmax(-1)
    mean_true, mean_rival = (mean.gather(-1, which).squeeze(-1).clamp_min(1e-12) for which in (index, rival))
    true, other = (each.gather(-1, which.expand(len(logits), -1, 1)).squeeze(-1) for which in (index, rival))
    return fused.weights * other * (true / mean_true + (1 - other) / mean_rival)


def _top_gap(logits: Tensor) -> Tensor:
    """(..., B): the largest logit minus the second."""
    largest = logits.topk(2, dim=-1).values
    return largest[..., 0] - largest[..., 1]


def _margin_of(members: Sequence[int]) -> Loss:
    return lambda logits, labels: margin(logits[list(members)], labels)
