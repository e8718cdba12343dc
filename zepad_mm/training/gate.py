"""Train a feature gate on unlabelled images: attacked ones against clean and corrupted ones, by cached features.

The gate reads what the benign encoder and the robust encoders say about one image (``zepad_mm/models/gate.py``). It
learns from clean images, everyday corruptions, universal perturbations, per-image attacks, and attacks that know the
gate of the round before. Thresholds are quantiles of its score on clean images that neither the fit nor its selection
has seen. Which example is made of which image follows from the seed, so that a killed run continues.
"""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zepad_mm.encoders import Encoder
from zepad_mm.evaluation.stage_cache import StageCache
from zepad_mm.models.gate import FeatureGate, GateConfig
from zepad_mm.training.checkpoint import crc_of
from zepad_mm.training.gate_calibration import GateRun, GateSplit, calibrate, measure
from zepad_mm.training.gate_examples import BACKWARD, ExampleMaker, crafting_passes
from zepad_mm.training.gate_fit import fit_gate
from zepad_mm.training.gate_images import ImagePool, Images
from zepad_mm.training.gate_settings import UNIDENTIFYING, GateSettings
from zepad_mm.utils.progress import Progress, say
from zepad_mm.utils.seeding import derived_generator

log = logging.getLogger(__name__)

FEWEST = 32  # images
MEASURED = 512  # validation images under each corruption and universal attack
ATTACKED_VALIDATION = 64  # validation images under each per-image attack, and in all rounds together


def train_gate(
    benign: Encoder,
    robust: Sequence[Encoder],
    images: Images | Mapping[str, Images],
    settings: GateSettings | None = None,
    *,
    calibration: Mapping[str, Images] | None = None,
    public: Encoder | None = None,
    directions: Tensor | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> tuple[FeatureGate, dict[str, Any]]:
    """Train and calibrate a gate around frozen encoders, on the benign encoder's device. Labels are never read.

    Args:
        benign: the encoder whose weight the gate sets.
        robust: the robust encoders, in the order of the model's branches.
        images: (N, 3, S, S) in [0, 1], a data set in memory or on disk, or several by name, all of one size.
        settings: everything else.
        calibration: further sets by name, of the same image size, that no example is trained on: half of each sets the
            thresholds, the other half measures false alarms.
        public: the encoder that attackers know; None: ``benign``.
        directions: (K, D) class embeddings of the public encoder, for attacks on margins; None: drawn from features.
        out: folder that keeps what is finished, so that a killed run continues; None: nothing is kept.
        progress: show a bar with the time left.

    Returns:
        The gate, frozen and in eval mode, with its thresholds; and a JSON-able record of how it was made, its false
        alarms by set and its AUROC by kind of attack, measured on validation images.

    Raises:
        ValueError: no robust encoder, too few images, images of different sizes, or ``out`` holds another run.
    """
    settings, started = settings or GateSettings(), time.perf_counter()
    if not robust:
        raise ValueError("robust: expected at least one robust encoder to compare the benign one with, got none")
    sources = dict(images) if isinstance(images, Mapping) else {getattr(images, "name", "images"): images}
    extra = {name if name not in sources else f"{name} (calibration)": one for name, one in (calibration or {}).items()}
    pool = ImagePool({**sources, **extra})
    parts = split_pool(pool, list(sources), settings)
    cache = _open_cache(out, pool, (benign, *robust, *([public] if public else [])), directions, settings)
    with Progress(total=_work(parts, settings), disable=not progress, unit="image", desc="training the gate") as bar:
        maker = ExampleMaker(
            benign, robust, pool, settings, public=public, directions=directions, cache=cache, progress=bar
        )
        run = _learn(maker, parts)
    gate, thresholds = calibrate(run, maker.widths, settings)
    record = {
        "settings": settings.to_dict(),
        "images": {name: len(pool.rows(name)) for name in pool.sources},
        "rows": {name: len(rows) for name, rows in vars(parts).items()},
        "examples": {part.name: len(part.rows) for part in run.train},
        "seen_attacks": list(gate.config.seen_attacks),
        "selected_step": run.fit.step,
        "mean_auroc": round(run.fit.auroc, 4),
        **thresholds,
        **measure(gate, run, maker.widths, thresholds),
        "seconds": round(time.perf_counter() - started, 1),
    }
    log.info("gate: mean AUROC %.3f on validation, %s s", run.fit.auroc, record["seconds"])
    return gate, record


def split_pool(pool: ImagePool, trained: Sequence[str], settings: GateSettings) -> GateSplit:
    """Disjoint rows by use; sets that are not ``trained`` on set thresholds and measure false alarms only.

    Raises ValueError for fewer than 32 images to train on.
    """
    total = sum(len(pool.rows(name)) for name in trained)
    if total < FEWEST:
        raise ValueError(f"images: expected at least {FEWEST} to train a gate and to calibrate it, got {total}")
    share = 1.0 if settings.n is None else min(1.0, settings.n / total)
    split: dict[str, list[Tensor]] = {"train": [], "validation": [], "calibration": [], "unseen": []}
    for name in pool.sources:
        rows = pool.rows(name)
        rows = rows[torch.randperm(len(rows), generator=derived_generator(settings.seed, "gate split", name))]
        if name in trained:
            rows = rows[: max(1, round(share * len(rows)))]
            first = math.ceil(len(rows) * settings.validation_share)
            second = first + math.ceil(len(rows) * settings.calibration_share)
            split["validation"].append(rows[:first])
            split["train"].append(rows[second:])
        else:
            first, second = len(rows) // 2, len(rows)
            split["unseen"].append(rows[:first])
        split["calibration"].append(rows[first:second])
    none = torch.zeros(0, dtype=torch.long)
    return GateSplit(**{name: torch.cat([none, *rows]).sort().values for name, rows in split.items()})


def _learn(maker: ExampleMaker, parts: GateSplit) -> GateRun:
    """Make examples and fit; then, in each round, add attacks that know the gate so far, and fit again."""
    settings, device = maker.settings, maker.device
    clean = maker.clean(torch.cat(list(vars(parts).values())).sort().values)
    order = _shuffled(parts.train, settings, "attacked")
    train = [clean.at(parts.train)]
    train += [maker.corrupted(parts.train, str(view)) for view in range(settings.corrupted_views)]
    validation = [clean.at(parts.validation)]
    some = _shuffled(parts.validation, settings, "measured")[:MEASURED].sort().values
    validation += [maker.corrupted(some, name, (name,)) for name in settings.corruptions]
    if settings.universal and settings.universal_views:
        half = order[: min(settings.universal_images, max(1, len(order) // 2))].sort().values
        made = {name: maker.perturbation(name, half) for name in settings.universal}
        train += [maker.universal(made, parts.train, str(view)) for view in range(settings.universal_views)]
        validation += [maker.universal({name: one}, some, name) for name, one in made.items()]
        if settings.held_out:
            own = {settings.held_out: maker.perturbation(settings.held_out, half)}
            validation += [maker.universal(own, some, settings.held_out, group="held_out")]
    if settings.per_image and settings.per_image_n:
        train.append(maker.per_image(order[: settings.per_image_n], "train", settings.per_image))
        few = _shuffled(parts.validation, settings, "attacked")[:ATTACKED_VALIDATION]
        validation += [maker.per_image(few, name, (name,)) for name in settings.per_image]
    if settings.stopped_n:
        train.append(maker.stopped(order.roll(-settings.per_image_n)[: settings.stopped_n], "train"))
        few = _shuffled(parts.validation, settings, "stopped")[: 2 * ATTACKED_VALIDATION]
        validation.append(maker.stopped(few, "validation"))
    config = GateConfig(
        kind=settings.kind, hidden=settings.hidden, dropout=settings.dropout, seen_attacks=_seen(settings)
    )
    fit = fit_gate(train, validation, maker.widths, config, settings, device)
    rounds = settings.rounds if settings.round_n and settings.kind == "learned" else 0
    say(log, "gate: mean AUROC %.3f on validation before %d rounds of attacks on the gate", fit.auroc, rounds)
    held = _shuffled(parts.validation, settings, "gate-aware")
    for number in range(rounds):
        first = settings.per_image_n + settings.stopped_n + number * settings.round_n
        rows = order.roll(-first)[: settings.round_n]
        part = -(-ATTACKED_VALIDATION // settings.rounds)
        few = held.roll(-number * part)[:part]
        train.append(maker.gate_aware(fit.gate, rows, f"{number} train"))
        validation.append(maker.gate_aware(fit.gate, few, f"{number} validation"))
        fit = fit_gate(train, validation, maker.widths, config, settings, device)
        say(log, "gate: mean AUROC %.3f on validation after round %d of %d", fit.auroc, number + 1, rounds)
    return GateRun(clean, train, validation, fit, parts, {name: maker.pool.rows(name) for name in maker.pool.sources})


def _shuffled(rows: Tensor, settings: GateSettings, purpose: str) -> Tensor:
    return rows[torch.randperm(len(rows), generator=derived_generator(settings.seed, "gate order", purpose))]


def _seen(settings: GateSettings) -> tuple[str, ...]:
    """Kinds of attacks that the fit or its selection has seen."""
    universal = (*settings.universal, *([settings.held_out] if settings.held_out else []))
    per_image = [name.partition(":")[0] for name in settings.per_image] if settings.per_image_n else []
    per_image += ["pgd"] if settings.stopped_n else []
    aware = ("gate_aware",) if settings.rounds and settings.round_n and settings.kind == "learned" else ()
    return (
        *(universal if settings.universal_views else ()),
        *dict.fromkeys(per_image),
        *aware,
    )


def _work(parts: GateSplit, settings: GateSettings) -> int:
    """How many passes of an image through the encoders the bar counts."""
    train, held = len(parts.train), min(MEASURED, len(parts.validation))
    passes = sum(map(len, vars(parts).values())) + train * settings.corrupted_views
    passes += held * len(settings.corruptions)
    if settings.universal and settings.universal_views:
        kinds = [*settings.universal, *([settings.held_out] if settings.held_out else [])]
        passes += train * settings.universal_views + held * len(kinds)
        passes += sum(crafting_passes(name, settings) for name in kinds)
    few = min(held, ATTACKED_VALIDATION)
    if settings.per_image_n:
        attacked = min(train, settings.per_image_n) + few * len(settings.per_image)
        passes += attacked * BACKWARD * settings.per_image_steps
    if settings.stopped_n:
        attacked = min(train, settings.stopped_n) + min(held, 2 * ATTACKED_VALIDATION)
        passes += attacked * BACKWARD * settings.per_image_steps
    if settings.round_n and settings.rounds:
        attacked = min(train, settings.round_n) + min(held, -(-ATTACKED_VALIDATION // settings.rounds))
        passes += settings.rounds * attacked * 2 * BACKWARD * settings.round_steps
    return passes


def _open_cache(
    out: str | Path | None,
    pool: ImagePool,
    encoders: Sequence[Encoder],
    directions: Tensor | None,
    settings: GateSettings,
) -> StageCache | None:
    """The cache in ``out``. Raises ValueError where it belongs to other encoders, images or settings."""
    if out is None:
        return None
    vectors = torch.zeros(0) if directions is None else directions.detach().float().cpu().contiguous()
    kept = {key: value for key, value in settings.to_dict().items() if key not in UNIDENTIFYING}
    identity = {
        "encoders": str([crc_of(encoder) for encoder in encoders]),
        "images": pool.checksum(),
        "directions": str(zlib.crc32(vectors.numpy().tobytes())),
        **{f"settings.{key}": str(value) for key, value in kept.items()},
    }
    cache = StageCache(Path(out))
    cache.open(identity, resume=True)
    return cache
