"""Figures from predictions and scores. Everything is a mean over samples, never over batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from zepad_mm.models.detection import PAPER_GAP, threshold_at

FALSE_POSITIVE_RATES = (0.01, 0.05)  # of clean validation pictures, that thresholds are set for


@dataclass(frozen=True)
class Share:
    """``count`` of ``n`` samples, with its 95 % Wilson interval; all in [0, 1]."""

    count: int
    n: int

    @property
    def value(self) -> float:
        return self.count / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high)."""
        return wilson(self.count, self.n)


def wilson(count: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of ``count`` of ``n``; 95 % by default. Raises ValueError for n < 1 or a count beyond n."""
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"wilson: expected 0 <= count <= n and n >= 1, got {count} of {n}")
    share = count / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def share(mask: Tensor) -> Share:
    """How many of a (n,) bool mask hold. Raises ValueError for none at all."""
    if mask.numel() == 0:
        raise ValueError("share: expected at least one sample, got none")
    return Share(int(mask.sum()), mask.numel())


def fooling_rate(clean: Tensor, attacked: Tensor) -> float:
    """The ASR of AdvEncoder, Gen-AF and ZePAD: share of ALL (n,) predictions that change, right or wrong before."""
    return share(clean != attacked).value


def flipped_when_right(clean: Tensor, attacked: Tensor, labels: Tensor) -> float | None:
    """The other ASR: among samples answered right without attack, the share answered wrong under it; None if none."""
    right = clean == labels
    return share(attacked[right] != labels[right]).value if bool(right.any()) else None


@dataclass(frozen=True)
class Detection:
    """How well a score tells attacked from clean pictures.

    Attributes:
        auroc: over clean and attacked test pictures; 0.5 is chance.
        tpr_at_fpr1, tpr_at_fpr5: share of attacked pictures above the threshold that 1 % / 5 % of clean VALIDATION
            pictures exceed.
        fpr_at_fpr1, fpr_at_fpr5: share of clean TEST pictures above those thresholds: what was really paid.
    """

    auroc: float
    tpr_at_fpr1: float
    tpr_at_fpr5: float
    fpr_at_fpr1: float
    fpr_at_fpr5: float


def auroc(clean: Tensor, attacked: Tensor) -> float:
    """Area under the ROC curve of (n,) and (m,) scores; attacked ones should be higher. NaN counts as unsuspicious."""
    truth = [0] * len(clean) + [1] * len(attacked)
    scores = torch.cat([clean, attacked]).double()
    return float(roc_auc_score(truth, scores.nan_to_num(nan=-1e30, posinf=1e30, neginf=-1e30).tolist()))


def detect(validation: Tensor, clean: Tensor, attacked: Tensor) -> Detection:
    """Detection figures of scores (v,) on clean validation, (n,) on clean test and (m,) on attacked test pictures."""
    thresholds = [threshold_at(validation, rate) for rate in FALSE_POSITIVE_RATES]
    true_rates = [share(attacked > threshold).value for threshold in thresholds]
    false_rates = [share(clean > threshold).value for threshold in thresholds]
    return Detection(auroc(clean, attacked), *true_rates, *false_rates)


def paper_rule_accuracy(clean_gap: Tensor, attacked_gap: Tensor) -> float:
    """Accuracy of the paper's rule (gap > 0.1) on clean and attacked pictures, both kinds weighing the same."""
    return (share(clean_gap <= PAPER_GAP).value + share(attacked_gap > PAPER_GAP).value) / 2
