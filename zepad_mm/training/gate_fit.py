"""Fit a feature gate to cached features by binary cross-entropy, and measure it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.evaluation.metrics import auroc
from zepad_mm.models.gate import FeatureGate, GateConfig
from zepad_mm.training.gate_images import Examples
from zepad_mm.training.gate_settings import GateSettings
from zepad_mm.utils.seeding import derived_generator, seeded

VALIDATION_EVERY = 25  # optimiser steps
INPUT_GAIN = 6.0  # of the standardised inputs, which makes up for small first weights
GROUP_WEIGHTS = {"gate_aware": 0.5}  # of attacked examples in the fit and in its selection; others count 1
SELECTING = 512  # validation examples of each kind that the weights are selected on
SCALED = 4096  # examples that standardise the inputs, drawn as those of the fit


@dataclass(frozen=True)
class GateFit:
    """The gate in eval mode on its device, the step it was selected at, and its mean AUROC on validation examples."""

    gate: FeatureGate
    step: int
    auroc: float
    device: torch.device


def gate_scores(gate: FeatureGate, features: Tensor, widths: Sequence[int], batch_size: int = 4096) -> Tensor:
    """Scores (n,) on the CPU, higher for attacked images, of features (n, D) of all encoders side by side."""
    device = next(gate.parameters(), features).device  # the cosine gate has none
    with torch.no_grad():
        parts = [gate(*split(batch.to(device), widths)).float().cpu() for batch in features.split(batch_size)]
    return torch.cat(parts) if parts else torch.zeros(0)


def gate_inputs(gate: FeatureGate, features: Tensor, widths: Sequence[int], batch_size: int = 4096) -> Tensor:
    """What a learned gate reads, (n, F) on its device, of features (n, D) of all encoders side by side."""
    device = next(gate.parameters()).device
    with torch.no_grad():
        parts = [gate.inputs(*split(batch.to(device), widths)) for batch in features.split(batch_size)]
    return torch.cat(parts) if parts else torch.zeros(0, gate.input_width, device=device)


def split(features: Tensor, widths: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Features side by side to those of the benign encoder and of each robust one."""
    benign, *robust = features.split(list(widths), 1)
    return benign, robust


def mean_auroc(scores: Sequence[Tensor], validation: Sequence[Examples]) -> float:
    """The weighted mean over groups of attacked examples of their AUROC against all unattacked ones."""
    clean = torch.cat([score for score, part in zip(scores, validation, strict=True) if not part.attacked])
    groups: dict[str, list[Tensor]] = {}
    for score, part in zip(scores, validation, strict=True):
        if part.attacked and len(score):
            groups.setdefault(part.group, []).append(score)
    weights = {name: GROUP_WEIGHTS.get(name, 1.0) for name in groups}
    found = sum(weights[name] * auroc(clean, torch.cat(group)) for name, group in groups.items())
    return found / sum(weights.values()) if groups else 0.5


def fit_gate(
    train: Sequence[Examples],
    validation: Sequence[Examples],
    widths: Sequence[int],
    config: GateConfig,
    settings: GateSettings,
    device: torch.device,
) -> GateFit:
    """A new gate, fitted to ``train`` and selected on ``validation``; the same for the same seed and examples.

    Attacked and unattacked examples count alike, and so do the groups among each.

    Raises:
        FloatingPointError: a non-finite loss.
    """
    with seeded(torch.device("cpu"), settings.seed, "gate weights"):
        gate = FeatureGate(widths[0], widths[1:], config)
    gate = gate.to(device)
    if config.kind == "cosine":
        scores = [gate_scores(gate, part.features, widths) for part in validation]
        return GateFit(gate.eval(), 0, mean_auroc(scores, validation), device)
    inputs = torch.cat([gate_inputs(gate, part.features, widths) for part in train])
    shares = _shares(train)
    some = shares.multinomial(SCALED, True, generator=derived_generator(settings.seed, "gate scale"))
    gate.fit_scale(inputs[some.to(device)])
    _weigh_blocks(gate)
    held = [gate_inputs(gate, part.features[:: -(-len(part.rows) // SELECTING) or 1], widths) for part in validation]
    labels = torch.cat([torch.full((len(part.rows),), float(part.attacked)) for part in train]).to(device)
    targets = labels * (1 - settings.label_smoothing) + settings.label_smoothing / 2
    drawn = shares.multinomial(
        settings.steps * settings.batch_size, True, generator=derived_generator(settings.seed, "gate batches")
    ).view(settings.steps, settings.batch_size)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    best, best_state, best_step = -1.0, copy.deepcopy(gate.state_dict()), 0
    with torch.inference_mode(False), torch.enable_grad(), seeded(device, settings.seed, "gate dropout"):
        for step, batch in enumerate(drawn.to(device), start=1):
            gate.train()
            loss = F.binary_cross_entropy_with_logits(gate.logit(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % VALIDATION_EVERY and step != settings.steps:
                continue
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the gate's loss is {float(loss)} in step {step}; lower lr")
            with torch.no_grad():
                gate.eval()
                found = mean_auroc([gate.logit(part) for part in held], validation)
            if found > best:
                best, best_state, best_step = found, copy.deepcopy(gate.state_dict()), step
            elif step - best_step >= settings.patience * VALIDATION_EVERY:
                break
    gate.load_state_dict(best_state)
    return GateFit(gate.eval().requires_grad_(False), best_step, best, device)


def _weigh_blocks(gate: FeatureGate) -> None:
    """Let the cosine and the norm ratio, one number each, count as much as a block of D features, in place.

    Otherwise the fit finds in a thousand entries what separates its own images, and does not use the distance of the
    two encoders, which tells attacks of other kinds on other images.
    """
    sizes = []
    for width in gate.robust_widths:
        sizes += [width, 1, *([width, 1] if width == gate.benign_width else [])]
    sizes = [gate.benign_width, *sizes]
    factors = torch.cat([torch.full((size,), size**0.5 / INPUT_GAIN) for size in sizes])
    gate.std.mul_(factors.to(gate.std))


def _shares(train: Sequence[Examples]) -> Tensor:
    """(n,) probabilities of the examples: half for each label, in the parts of its groups."""
    sizes: dict[tuple[bool, str], int] = {}
    for part in train:
        if len(part.rows):
            key = (part.attacked, part.group)
            sizes[key] = sizes.get(key, 0) + len(part.rows)
    totals = {
        label: sum(GROUP_WEIGHTS.get(group, 1.0) for attacked, group in sizes if attacked == label)
        for label in (True, False)
    }
    return torch.cat(
        [
            torch.full(
                (len(part.rows),),
                0.5 * GROUP_WEIGHTS.get(part.group, 1.0) / totals[part.attacked] / sizes[part.attacked, part.group],
            )
            for part in train
            if len(part.rows)
        ]
    )
