"""Names of encoders, and the lines of a table.

An encoder has a name: that of the zoo (``simclr``), ``bmp`` for the benign one, and ``ENCODER+TUNING`` for the result
of a tuning of :attr:`~reproduction.paper.study.Settings.tunings` (``simclr+gen_af``); with ``=`` appended, its head is
the one that was tuned with it, not a clean one trained for the task. ``@SEED`` before that is another seed of the
tuning, the gate and the heads (``simclr+fare@1``, ``simclr@1``); pre-training, test images and perturbations stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from zepad_mm.models import fusion
from zepad_mm.models.config import GATED_RULE, DetectorConfig
from zepad_mm.models.detection import GATE_SCORE
from zepad_mm.models.gate import FeatureGate


@dataclass(frozen=True)
class Line:
    """A row of a table: encoders by name, and the rule that fuses them; one encoder alone has none."""

    members: tuple[str, ...]
    rule: str = ""
    params: tuple[tuple[str, float], ...] = ()

    @property
    def gated(self) -> bool:
        """Whether a gate weighs its benign encoder."""
        return self.rule == GATED_RULE

    def fusion(self, gate: FeatureGate | None = None) -> fusion.Fusion:
        """The fusion rule; encoders that no attack tuned are the benign ones."""
        benign, found = [not adversarial(name) for name in self.members], gate.config if gate and self.gated else None
        score = GATE_SCORE if found else DetectorConfig().score
        return fusion.build(self.rule, benign, score, dict(self.params), found)


def single(name: str) -> Line:
    """One encoder alone."""
    return Line((name,))


def fused(rule: str, members: tuple[str, ...], **params: float) -> Line:
    """A fusion of encoders."""
    return Line(members, rule, tuple(params.items()))


class Parts(NamedTuple):
    """What the name of an encoder says."""

    base: str
    tuning: str  # "": none
    seed: int | None  # None: that of the study
    own_head: bool


def parts(name: str) -> Parts:
    """Split ENCODER+TUNING@SEED=, of which all but ENCODER may be missing."""
    body, _, seed = name.removesuffix("=").partition("@")
    base, _, tuning = body.partition("+")
    return Parts(base, tuning, int(seed) if seed else None, name.endswith("="))


def with_seed(name: str, seed: int | None) -> str:
    """A name without a seed, at a seed; None is that of the study."""
    return name if seed is None else f"{name}@{seed}"


def adversarial(name: str) -> bool:
    """Whether an encoder was tuned on adversarial images."""
    tuning = parts(name).tuning
    return bool(tuning) and not tuning.startswith("clean")
