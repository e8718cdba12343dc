"""Thresholds of a feature gate on clean images that it was not trained on, and its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zepad_mm.evaluation.metrics import auroc
from zepad_mm.models.detection import threshold_at
from zepad_mm.models.gate import FeatureGate
from zepad_mm.training.gate_fit import GateFit, fit_gate, gate_scores
from zepad_mm.training.gate_images import Examples
from zepad_mm.training.gate_settings import GateSettings

CLEAR = math.log(0.995 / 0.005)  # the logit of 99.5 %: what a typical clean image keeps of the benign weight
SHARPNESS = (0.5, 20.0)  # lowest and highest
STRICTER = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)  # parts of a rate that calibration may aim at
MOST_FOLDS = 5  # fits that leave sources out


@dataclass(frozen=True)
class GateSplit:
    """Disjoint rows of the pool (n,), sorted.

    Attributes:
        train: the fit.
        validation: its selection, and metrics.
        calibration: thresholds.
        unseen: of sets that are not trained on; false alarms alone.
    """

    train: Tensor
    validation: Tensor
    calibration: Tensor
    unseen: Tensor


@dataclass(frozen=True)
class GateRun:
    """Examples by use, and the last fit.

    Attributes:
        clean: of all rows.
        rows: of each source, by name.
    """

    clean: Examples
    train: list[Examples]
    validation: list[Examples]
    fit: GateFit
    parts: GateSplit
    rows: dict[str, Tensor]


def calibrate(run: GateRun, widths: Sequence[int], settings: GateSettings) -> tuple[FeatureGate, dict[str, Any]]:
    """The gate with its threshold, as steep as keeps the weight of typical clean images near the cap; and a record.

    Thresholds are quantiles of the score on calibration images. Images of a set that the gate was not trained on score
    higher. With several training sets, gates that leave some out tell how many false alarms a quantile really gives on
    sets never seen, and the quantile is made stricter until these are as many as asked for. With
    ``settings.worst_gating_rate`` the threshold of the benign weight rises until no single set has more false alarms.
    """
    gate = run.fit.gate
    calibration = run.clean.at(run.parts.calibration)
    scores = gate_scores(gate, calibration.features, widths)
    targets = {"gating": settings.gating_rate, "detection": settings.detection_rate}
    left_out = _left_out_scores(run, widths, settings)
    factors = {name: _factor(left_out, rate) for name, rate in targets.items()}
    thresholds = {name: threshold_at(scores, rate * factors[name]) for name, rate in targets.items()}
    if settings.worst_gating_rate is not None:
        of_sets = (scores[torch.isin(calibration.rows, rows)] for rows in run.rows.values())
        bounds = [threshold_at(found, settings.worst_gating_rate) for found in of_sets if len(found)]
        thresholds["gating"] = max(thresholds["gating"], *bounds)
    threshold = thresholds["gating"]
    sharpness = CLEAR / max(threshold - float(scores.median()), 1e-6)
    gate.config = replace(
        gate.config,
        threshold=threshold,
        sharpness=min(max(sharpness, SHARPNESS[0]), SHARPNESS[1]),
        robust_scale=settings.robust_scale,
        false_alarm_rate=settings.gating_rate,
    )
    alarms = {name: [_alarms(*pair, rate) for pair in left_out] for name, rate in targets.items()}
    return gate, {
        "thresholds": thresholds,
        "quantiles": {name: rate * factors[name] for name, rate in targets.items()},
        "false_alarms_of_sets_left_out": {
            name: round(sum(found) / len(found), 4) for name, found in alarms.items() if found
        },
    }


def _left_out_scores(run: GateRun, widths: Sequence[int], settings: GateSettings) -> list[tuple[Tensor, Tensor]]:
    """For each fold of training sets, scores of a gate that did not see it: calibration images, images of the fold."""
    trained = [name for name, rows in run.rows.items() if torch.isin(rows, run.parts.train).any()]
    if len(trained) < 2 or settings.kind == "cosine":
        return []
    found = []
    for number in range(min(MOST_FOLDS, len(trained))):
        fold = torch.cat([run.rows[name] for name in trained[number::MOST_FOLDS]])
        train, validation = ([part.without(fold) for part in parts] for parts in (run.train, run.validation))
        gate = fit_gate(train, validation, widths, run.fit.gate.config, settings, run.fit.device).gate
        known, unseen = run.clean.at(run.parts.calibration).without(fold), run.clean.at(fold)
        found.append((gate_scores(gate, known.features, widths), gate_scores(gate, unseen.features, widths)))
    return found


def _factor(left_out: Sequence[tuple[Tensor, Tensor]], rate: float) -> float:
    """The largest part of ``rate`` at which sets left out have at most ``rate`` false alarms in the mean."""
    for factor in STRICTER:
        if sum(_alarms(*pair, rate * factor) for pair in left_out) <= rate * len(left_out):
            return factor
    return STRICTER[-1]


def _alarms(known: Tensor, unseen: Tensor, rate: float) -> float:
    """The share of unseen scores above the threshold that a share of known scores exceeds."""
    return float((unseen > threshold_at(known, rate)).float().mean())


def measure(gate: FeatureGate, run: GateRun, widths: Sequence[int], calibration: Mapping[str, Any]) -> dict[str, Any]:
    """False alarms by set and by corruption, AUROC by kind of attack; none on calibration images."""
    thresholds, parts = calibration["thresholds"], run.parts
    scores = {part.name: gate_scores(gate, part.features, widths) for part in run.validation if len(part.rows)}
    held = run.clean.at(torch.cat([parts.validation, parts.unseen]))
    unattacked = {name: gate_scores(gate, held.at(rows).features, widths) for name, rows in run.rows.items()}
    unattacked |= {part.kind: scores[part.name] for part in run.validation if part.group == "corrupted"}
    reference = scores[run.validation[0].name]
    return {
        "false_alarms": {
            name: {"n": len(found), **{which: _share(found > at) for which, at in thresholds.items()}}
            for name, found in unattacked.items()
            if len(found)
        },
        "clean_weight": round(float(gate.weight(reference).mean()), 4),
        "attacks": {
            part.name: {
                "n": len(part.rows),
                "auroc": round(auroc(reference, scores[part.name]), 4),
                "detected": _share(scores[part.name] > thresholds["detection"]),
                "weight": round(float(gate.weight(scores[part.name]).mean()), 4),
            }
            for part in run.validation
            if part.attacked and len(part.rows)
        },
    }


def _share(mask: Tensor) -> float:
    return round(float(mask.float().mean()), 4)
