"""Metrics from predictions and scores: shares with intervals, attack success, detection. Means are over samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.stats import binomtest
from torch import Tensor

from zepad_mm.models.detection import PAPER_GAP, threshold_at

FALSE_POSITIVE_RATES = (0.01, 0.05)  # of clean validation images, that thresholds are set for


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


@lru_cache(maxsize=4096)  # rows share their counts, and binomtest also computes a p-value
def wilson(count: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of ``count`` of ``n``. Raises ValueError for n < 1 or a count beyond n."""
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"wilson: expected 0 <= count <= n and n >= 1, got {count} of {n}")
    interval = binomtest(count, n).proportion_ci(method="wilson")
    return min(count / n, float(interval.low)), max(count / n, float(interval.high))


def share(mask: Tensor) -> Share:
    """Return how many of a (n,) bool mask are True. Raises ValueError for an empty mask."""
    if mask.numel() == 0:
        raise ValueError("share: expected at least one sample, got none")
    return Share(int(mask.sum()), mask.numel())


def fooling_rate(clean: Tensor, attacked: Tensor) -> float:
    """Return the ASR of AdvEncoder, Gen-AF and ZePAD: share of ALL (n,) predictions that change, right or wrong."""
    return share(clean != attacked).value


def flipped_when_right(clean: Tensor, attacked: Tensor, labels: Tensor) -> float | None:
    """Return the other ASR: of the samples answered right without an attack, the share answered wrong under it.

    None where no sample is answered right.
    """
    right = clean == labels
    return share(attacked[right] != labels[right]).value if bool(right.any()) else None


@dataclass(frozen=True)
class Detection:
    """How well a score separates attacked from clean images.

    Attributes:
        auroc: over clean and attacked test images; 0.5 is chance.
        tpr_at_fpr1, tpr_at_fpr5: share of attacked images above the threshold that 1 % / 5 % of clean VALIDATION
            images exceed.
        fpr_at_fpr1, fpr_at_fpr5: share of clean TEST images above those thresholds: the false alarms really paid.
        tpr_at_real_fpr1, tpr_at_real_fpr5: share of attacked images above the threshold that 1 % / 5 % of clean TEST
            images exceed: what the score detects at these false alarms.
    """

    auroc: float
    tpr_at_fpr1: float
    tpr_at_fpr5: float
    fpr_at_fpr1: float
    fpr_at_fpr5: float
    tpr_at_real_fpr1: float
    tpr_at_real_fpr5: float


def auroc(clean: Tensor, attacked: Tensor) -> float:
    """Return the area under the ROC curve of (n,) clean and (m,) attacked scores. NaN counts as unsuspicious.

    It is the share of pairs in which the attacked score is the higher one; equal scores count half. Raises ValueError
    where there is no score of one kind.
    """
    if not len(clean) or not len(attacked):
        raise ValueError(f"auroc: expected scores of both kinds, got {len(clean)} clean and {len(attacked)} attacked")
    ordered, scores = (values.double().nan_to_num(-1e30, 1e30, -1e30) for values in (clean, attacked))
    ordered = ordered.sort().values
    lower, not_higher = (torch.searchsorted(ordered, scores, right=right).sum() for right in (False, True))
    return float(lower + not_higher) / (2 * len(clean) * len(attacked))


def detect(validation: Tensor, clean: Tensor, attacked: Tensor) -> Detection:
    """Return detection metrics of scores (v,) on clean validation, (n,) clean test and (m,) attacked test images."""
    thresholds = [threshold_at(validation, rate) for rate in FALSE_POSITIVE_RATES]
    true_rates = [share(attacked > threshold).value for threshold in thresholds]
    false_rates = [share(clean > threshold).value for threshold in thresholds]
    real = [share(attacked > threshold_at(clean, rate)).value for rate in FALSE_POSITIVE_RATES]
    return Detection(auroc(clean, attacked), *true_rates, *false_rates, *real)


def paper_rule_accuracy(clean_gap: Tensor, attacked_gap: Tensor) -> float:
    """Return the accuracy of the paper's rule (gap > 0.1) on clean and attacked images, both weighted equally."""
    return (share(clean_gap <= PAPER_GAP).value + share(attacked_gap > PAPER_GAP).value) / 2
