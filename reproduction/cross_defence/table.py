"""All cells of the table: every defence on every task, resumable, in one or several processes.

A cell is written to ``work/cells`` as soon as it is measured; a second start measures what is missing. Several
processes share one GPU well, since small encoders wait for kernel launches most of the time.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reproduction.cross_defence import smoothing
from reproduction.cross_defence.attacks import (
    AUTHORS,
    Search,
    Strength,
    adaptive_attack,
    authors_attack,
    share_right,
    transferred,
)
from reproduction.cross_defence.base import DEFENCES, Defence, Parts, Plain
from reproduction.cross_defence.cost import ABOUT, about, cost
from reproduction.cross_defence.fusions import with_cap
from reproduction.cross_defence.images import Rows, read_rows
from zepad_mm.attacks import UNIVERSAL_ATTACKS, Perturbation, frozen
from zepad_mm.data import LabelledImages
from zepad_mm.encoders import Encoder, load_clip
from zepad_mm.encoders.inference import optimize_for_inference
from zepad_mm.encoders.lora import merge_lora
from zepad_mm.evaluation.metrics import wilson
from zepad_mm.evaluation.subjects import EncoderWithHead
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import ZePAD
from zepad_mm.training.artifacts import TUNED_RECORD, load_tuned
from zepad_mm.training.checkpoint import crc_of
from zepad_mm.utils.config import Config
from zepad_mm.utils.io import read_json, read_tensors, write_json, write_tensors
from zepad_mm.utils.provenance import check_identity, provenance
from zepad_mm.utils.seeding import seeded

log = logging.getLogger(__name__)

TASKS = ("clothing144", "imagenet20", "caltech69", "tinyimagenet80")
CERTIFIED_RADII = (0.05, 0.1, 0.15)  # L2, in pixels of [0, 1]
CHOICES = ("defences", "caps", "epsilons")  # of rows and columns, may differ as well
PLACES = ("images", "work", "device", "workers", "limit", "model", "clip", "branches")  # may differ in a resumed run


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """Settings of the table."""

    model: str  # the defended model under test: its first robust branch is the robust encoder
    clip: str = "open_clip:embedded"  # source of the public CLIP
    images: str  # folder of parquet folders, or a packed file
    caps: tuple[float, ...] = (0.25,)  # on the benign weight of a gated model under test: each gets a row
    branches: tuple[str, ...] = ()  # further defended models or tuned encoders, whose robust encoders get a row
    tasks: tuple[str, ...] = TASKS  # names of sources of images
    defences: tuple[str, ...] = ()  # keys; empty: all
    n: int = 200  # test images of each task
    n_calibration: int = 64  # clean training images of each task, for thresholds
    n_surrogate: int = 600  # training images of the last task, which the attacker crafts universal perturbations on
    seed: int = 0
    epsilons: tuple[float, ...] = (4 / 255, 1 / 255)  # of per-image attacks, in pixels of [0, 1]
    epsilon_universal: float = 10 / 255
    universal: tuple[str, ...] = ("feature_uap", "uapgd", "adv_encoder")
    universal_steps: dict[str, int] = field(default_factory=lambda: {"adv_encoder": 60})  # others take their default
    certify_n: int = 128  # noisy copies for a certificate
    certify_images: int = 50  # of each task, that get one
    strength: Strength = field(default_factory=Strength)
    work: str = "outputs/cross_defence"
    device: str = "cpu"
    workers: int = 0  # processes; 0: this one
    limit: float | None = None  # seconds after which no further cell is begun; the record then lacks the rest

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ValueError("tasks: expected at least one")
        for key in ("n", "n_calibration", "n_surrogate"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected at least 1, got {getattr(self, key)}")
        for cap in self.caps:
            if not 0 <= cap <= 1:
                raise ValueError(f"caps: expected shares in [0, 1], got {cap}")
        if not Path(self.images).exists():
            raise FileNotFoundError(f"{self.images}: expected a folder of parquet folders or a packed file")

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common, beside the weights of the encoders."""
        found = {key: value for key, value in self.to_dict().items() if key not in (*PLACES, *CHOICES)}
        found["strength"].pop("capacity")  # after an error for lack of memory it may be smaller
        return found


@dataclass(frozen=True)
class Job:
    """One piece of work: the cells of a defence on a task without an epsilon, or those at one epsilon."""

    task: str
    defence: str
    epsilon: float | None

    @property
    def file(self) -> str:
        budget = "base" if self.epsilon is None else f"{255 * self.epsilon:g}"
        return f"{self.task}--{self.defence.replace('/', '.')}--{budget}.json"


# ---- what is measured ------------------------------------------------------------------------------------------------


class Bench:
    """The models, the images and the defences of one process."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.work = settings, Path(settings.work)
        self.device = torch.device(settings.device)
        encoder, self.text = load_clip(settings.clip)
        self.side, self.preprocess = encoder.preprocess.image_size, encoder.preprocess
        model = ZePAD.from_pretrained(settings.model)
        robust = _robust_encoders(settings.model, model)
        self.weights = encoder, _merged(next(iter(robust.values()))[0])
        self.encoder, self.robust = (self._ready(one) for one in self.weights)
        self.defended = self._ready(model)
        others = dict(list(robust.items())[1:])
        for source in settings.branches:
            others |= _robust_encoders(source)
        self.others = {name: self._ready(one) for name, (one, _) in others.items()}
        self.caps = {f"ours, cap {cap:g}": cap for cap in settings.caps if model.gate is not None}
        self.objectives = {name: f"Robust encoder alone: {text}." for name, (_, text) in others.items()}
        self.objectives |= {
            name: f"The defended model with a benign weight of at most {cap:g}." for name, cap in self.caps.items()
        }
        self.text.to(self.device)
        for name in self.names:
            if name not in (*self.caps, *self.others):
                DEFENCES.get(name)  # an unknown one ends the run before it begins
        self.data = lru_cache(maxsize=None)(self._data)
        self.parts = lru_cache(maxsize=1)(self._parts)
        self.defence = lru_cache(maxsize=32)(self._defence)

    def _ready(self, module: Any) -> Any:
        return optimize_for_inference(module.to(self.device), self.side).eval().requires_grad_(False)

    @property
    def names(self) -> list[str]:
        """Keys of all defences."""
        return self.settings.defences or [*DEFENCES.names(), *self.caps, *self.others]  # type: ignore[return-value]

    def text_of(self, name: str) -> str:
        """What a defence is, in a sentence."""
        return self.objectives.get(name) or DEFENCES.get(name).__doc__ or ""

    def rows(self, task: str, part: str, n: int) -> Rows:
        return read_rows(Path(self.settings.images), task, part).sample(n, self.settings.seed)

    def _data(self, task: str) -> LabelledImages:
        """The test images of a task, on the device."""
        data = self.rows(task, "test", self.settings.n).decode(self.preprocess)
        return replace(data, images=data.images.to(self.device), labels=data.labels.to(self.device))

    @property
    def surrogate(self) -> Tensor:
        """The attacker's own images, on the device."""
        task = self.settings.tasks[-1]
        return self.rows(task, "train", self.settings.n_surrogate).decode(self.preprocess).images.to(self.device)

    @property
    def calibration(self) -> Tensor:
        """Clean training images of all tasks, on the device."""
        count = self.settings.n_calibration
        rows = [self.rows(task, "train", count).decode(self.preprocess).images for task in self.settings.tasks]
        return torch.cat(rows).to(self.device)

    def _parts(self, task: str) -> Parts:
        names = self.data(task).class_names
        head = zero_shot_head(self.text, names).to(self.device)
        self.defended.set_classes(names)
        self.defence.cache_clear()
        models = [EncoderWithHead(encoder, head).eval() for encoder in (self.encoder, self.robust)]
        return Parts(models[0], models[1], self.defended, self.calibration, self.weights)

    def _defence(self, task: str, name: str) -> Defence:
        parts = self.parts(task)
        with seeded(self.device, self.settings.seed, "calibration", name):
            if name in self.caps:
                return with_cap(parts.defended, self.caps[name]).eval()
            if name in self.others:
                return Plain(EncoderWithHead(self.others[name], parts.undefended.head)).eval()
            return DEFENCES.get(name)(parts).to(self.device).eval()

    def perturbations(self) -> dict[str, Perturbation]:
        """Universal perturbations made on the public encoder, crafted once."""
        found, surrogate = {}, None
        for name in self.settings.universal:
            path = self.work / "perturbations" / f"{name}.safetensors"
            if not path.is_file():
                surrogate = self.surrogate if surrogate is None else surrogate
                steps = self.settings.universal_steps.get(name)
                extra: dict[str, Any] = {} if steps is None else {"steps": steps}
                attack = UNIVERSAL_ATTACKS.get(name)(
                    epsilon=self.settings.epsilon_universal, image_size=self.side, seed=self.settings.seed, **extra
                )
                attack.fit(self.encoder, surrogate).save(path)
            found[name] = Perturbation.load(path)
        return found

    def transferred(self, task: str, epsilon: float) -> dict[str, Tensor]:
        """Examples made without the defence, by attack: made once, then read."""
        path = self.work / "transferred" / f"{task}--{255 * epsilon:g}.safetensors"
        if not path.is_file():
            data, parts = self.data(task), self.parts(task)
            made = transferred(parts, data.images, data.labels, epsilon, self.settings.strength)
            for name, perturbation in self.perturbations().items():
                made[f"universal {name}"] = perturbation.rescaled(epsilon)(data.images)
            write_tensors(path, {name: images.cpu() for name, images in made.items()}, {})
        return {name: images.to(self.device) for name, images in read_tensors(path)[0].items()}

    def measure(self, job: Job) -> list[dict[str, Any]]:
        """The cells of a job."""
        with seeded(self.device, self.settings.seed, job.file):
            defence = self.defence(job.task, job.defence)
            with frozen(defence):
                if job.epsilon is None:
                    return [*self._base_cells(job, defence), *self._certificate(job, defence)]
                return self._attack_cells(job, defence, job.epsilon)

    def _cell(self, job: Job, column: str, right: Tensor, since: float, **about: Any) -> dict[str, Any]:
        count, n = round(float(right.sum())), len(right)
        low, high = wilson(count, n)
        interval = {"correct": count, "accuracy": count / n, "ci_low": low, "ci_high": high}
        seconds = round(time.perf_counter() - since, 2)
        key = {"defence": job.defence, "task": job.task, "column": column, "epsilon": job.epsilon, "n": n}
        return {**key, **interval, "seconds": seconds, **about}

    def _base_cells(self, job: Job, defence: Defence) -> Iterator[dict[str, Any]]:
        data, strength, since = self.data(job.task), self.settings.strength, time.perf_counter()
        right = share_right(defence, data.images, data.labels, strength)
        described = cost(defence, data.images, strength) | about(defence)
        yield self._cell(job, "clean", right, since, **described)
        since, search = time.perf_counter(), Search(defence, data.images, data.labels, strength)
        for name, perturbation in self.perturbations().items():
            search.look(name, perturbation(data.images).__getitem__)
        cell = self._cell(job, "T1", search.right, since, after=search.after)
        yield {**cell, "epsilon": self.settings.epsilon_universal}

    def _certificate(self, job: Job, defence: Defence) -> Iterator[dict[str, Any]]:
        if not isinstance(defence, smoothing.Smoothing) or not self.settings.certify_n:
            return
        data, since = self.data(job.task), time.perf_counter()
        images, labels = (part[: self.settings.certify_images] for part in (data.images, data.labels))
        size = max(1, self.settings.strength.capacity // defence.views)
        found = [defence.certify(few, self.settings.certify_n) for few in images.split(size)]
        right = torch.cat([chosen for chosen, _ in found]) == labels
        radius = torch.cat([radius for _, radius in found])
        for least in CERTIFIED_RADII:
            yield self._cell(job, f"certified L2 {least:g}", (right & (radius >= least)).float(), since)
            since = time.perf_counter()  # all radii come from the same answers

    def _attack_cells(self, job: Job, defence: Defence, epsilon: float) -> list[dict[str, Any]]:
        data, strength, since = self.data(job.task), self.settings.strength, time.perf_counter()
        made, cells, stronger = self.transferred(job.task, epsilon), [], torch.inf
        if defence.attack != "universal":  # whose column is T1
            examples = authors_attack(defence, data.images, data.labels, epsilon, strength, made)
            right = share_right(defence, examples, data.labels, strength)
            cells.append(self._cell(job, "authors", right, since, attack=AUTHORS[defence.attack]))
            made, stronger = {**made, "authors": examples}, float(right.sum())
        since = time.perf_counter()
        found = adaptive_attack(defence, data.images, data.labels, epsilon, strength, made)
        if float(found.right.sum()) <= stronger:
            right = found.right  # else the answers of a random defence differ by chance: the stronger attack counts
        return [*cells, self._cell(job, "adaptive", right, since, after=found.after)]


def _robust_encoders(source: str, model: ZePAD | None = None) -> dict[str, tuple[Encoder, str]]:
    """The robust encoders of a defended model, or a tuned one, by a name for their rows; with their objective."""
    name = Path(source).name
    if (Path(source) / TUNED_RECORD).is_file():
        return {name: (load_tuned(source), str(read_json(Path(source) / TUNED_RECORD).get("defence", "")))}
    model = ZePAD.from_pretrained(source) if model is None else model
    robust = [branch for branch in model.config.branches if branch.role == "robust"]
    found = {f"{name}/{one.name}": (model.branch(one.name).encoder, one.objective) for one in robust}
    if not found:
        raise ValueError(f"{source}: expected a model with a robust branch, got {', '.join(model.branches)}")
    return found


def _merged(encoder: Encoder) -> Encoder:
    """A copy with its adapter folded into the weights."""
    encoder = copy.deepcopy(encoder)
    merge_lora(encoder)
    return encoder


# ---- processes -------------------------------------------------------------------------------------------------------

_bench: Bench | None = None


def _start(settings: Settings) -> None:
    """Load everything in a process."""
    global _bench  # noqa: PLW0603  one bench per process, made by its initializer
    torch.set_num_threads(max(1, torch.get_num_threads() // max(1, settings.workers)))
    _bench = Bench(settings)


def _bench_of_process() -> Bench:
    assert _bench is not None
    return _bench


def _transfer(task: str, epsilon: float) -> None:
    _bench_of_process().transferred(task, epsilon)


def _measure(job: Job) -> list[dict[str, Any]]:
    return _bench_of_process().measure(job)


def measure(settings: Settings) -> dict[str, Any]:
    """Measure every cell that is missing; returns the record of all that are there."""
    work, began = Path(settings.work), time.perf_counter()
    bench, identity = Bench(settings), work / "settings.json"
    expected = settings.identity() | {"encoders": [crc_of(encoder) for encoder in bench.weights]}
    if identity.is_file():
        check_identity(read_json(identity), expected, identity)
    write_json(identity, expected)
    for task in settings.tasks:
        bench.rows(task, "test", 1)  # a missing one ends the run before it begins
    bench.perturbations()
    first, *later = settings.epsilons  # a cut-off run has whole columns; thresholds are set once for both of the first
    columns = [(None, first), *([epsilon] for epsilon in later)]
    jobs = [
        Job(task, name, epsilon)
        for column in columns
        for task in settings.tasks
        for name in bench.names
        for epsilon in column
    ]
    missing = [job for job in jobs if not (work / "cells" / job.file).is_file()]
    log.info("%d of %d jobs to do", len(missing), len(jobs))
    _run(settings, bench, missing, began, lambda job, cells: write_json(work / "cells" / job.file, cells))
    files = [path for job in jobs if (path := work / "cells" / job.file).is_file()]
    cells = [cell for path in files for cell in read_json(path)]
    clean = {cell["defence"]: cell for cell in cells if cell["column"] == "clean"}
    shown = [
        {"key": name, "about": bench.text_of(name), **{key: clean[name][key] for key in ABOUT}}
        for name in bench.names
        if name in clean
    ]
    cells = [{key: value for key, value in cell.items() if key not in ABOUT} for cell in cells]
    config = {key: value for key, value in settings.to_dict().items() if key not in PLACES}
    config |= {"model": Path(settings.model).name, "clip": settings.clip, "image_size": bench.side}
    meta = provenance(seed=settings.seed, config=config) | {"cells_s": round(sum(cell["seconds"] for cell in cells))}
    return {"meta": meta, "defences": shown, "cells": cells}


def _run(
    settings: Settings,
    bench: Bench,
    jobs: list[Job],
    began: float,
    done: Callable[[Job, list[dict[str, Any]]], None],
) -> None:
    """Do the jobs in this process or in several until the limit, and hand over the cells of each.

    A job that fails is logged and leaves its cells out: the other rows do not depend on it.
    """
    started, finished = time.perf_counter(), 0

    def finish(job: Job, work: Callable[[], list[dict[str, Any]]]) -> bool:
        """Hand over, and say whether to go on."""
        nonlocal finished
        cells: list[dict[str, Any]] = []
        try:
            cells = work()
            done(job, cells)
        except Exception:
            log.exception("%s on %s failed", job.defence, job.task)
        finished, now = finished + 1, time.perf_counter()
        left = (now - started) / finished * (len(jobs) - finished)
        shown = ", ".join(f"{cell['column']} {100 * cell['accuracy']:.1f}" for cell in cells)
        log.info("%d of %d, about %.0f s left: %s on %s: %s", finished, len(jobs), left, job.defence, job.task, shown)
        return settings.limit is None or now - began < settings.limit

    if not settings.workers:
        for job in jobs:
            if not finish(job, partial(bench.measure, job)):
                return
        return
    context = get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(settings.workers, context, initializer=_start, initargs=(settings,)) as pool:
        keys = sorted({(job.task, job.epsilon) for job in jobs if job.epsilon is not None})
        list(pool.map(_transfer, *zip(*keys, strict=True)) if keys else ())
        waiting = {pool.submit(_measure, job): job for job in jobs}
        for future in as_completed(list(waiting)):
            if not finish(waiting.pop(future), future.result):
                break
        pool.shutdown(cancel_futures=True)  # what runs is waited for
        for future, job in waiting.items():
            if not future.cancelled():
                finish(job, future.result)
