"""Suites: named collections of data sets, evaluated at several budgets with one set of attacks.

``evaluate_suite({"openai": "open_clip:ViT-B-32/openai"}, "clip13", out="outputs/clip13")`` evaluates every model on
every data set at every budget, in ``out/TASK/BUDGET``. ``out/suite.json`` names the commit of each data set and
``out/images`` the rows that were drawn; a killed suite continues there at the same commits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from zepad_mm.data.webdataset import Webdataset
from zepad_mm.evaluation.data import rows_by_rule
from zepad_mm.evaluation.engine import evaluate
from zepad_mm.evaluation.report import Report, joined
from zepad_mm.evaluation.settings import PRESETS, EvalSettings
from zepad_mm.utils.distributed import Processes, claim_together
from zepad_mm.utils.io import read_json, write_json
from zepad_mm.utils.locks import output_folder
from zepad_mm.utils.provenance import provenance
from zepad_mm.utils.registry import Registry

log = logging.getLogger(__name__)

PLAN, IMAGES = "suite.json", "images"
SPLIT = "test"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One suite.

    Attributes:
        about: what it is, in a sentence.
        tasks: name -> data set, as for :func:`zepad_mm.data.load_data`; all images come from the split "test".
        budgets: L-inf budgets of the white-box attack, in pixels of [0, 1].
        preset: the attacks, a name of ``PRESETS``.
    """

    about: str
    tasks: Mapping[str, str]
    budgets: tuple[float, ...] = (1 / 255, 2 / 255, 4 / 255)
    preset: str = "apgd_ce_t"


SUITES: Registry[Suite] = Registry("suite")
# the sets and names of https://github.com/chs20/RobustVLM, CLIP_benchmark/benchmark/datasets.txt
SUITES.register("clip13")(
    Suite(
        about="the thirteen zero-shot data sets of CLIP_benchmark that FARE, LORE and others report on",
        tasks={
            "caltech101": "wds:clip-benchmark/wds_vtab-caltech101",
            "cars": "wds:clip-benchmark/wds_cars",
            "cifar10": "wds:clip-benchmark/wds_vtab-cifar10",
            "cifar100": "wds:clip-benchmark/wds_vtab-cifar100",
            "dtd": "wds:clip-benchmark/wds_vtab-dtd",
            "eurosat": "wds:clip-benchmark/wds_vtab-eurosat",
            "fgvc_aircraft": "wds:clip-benchmark/wds_fgvc_aircraft",
            "flowers": "wds:clip-benchmark/wds_vtab-flowers",
            "imagenet-r": "wds:clip-benchmark/wds_imagenet-r",
            "imagenet_sketch": "wds:clip-benchmark/wds_imagenet_sketch",
            "pcam": "wds:clip-benchmark/wds_vtab-pcam",
            "pets": "wds:clip-benchmark/wds_vtab-pets",
            "stl10": "wds:clip-benchmark/wds_stl10",
        },
    )
)


def evaluate_suite(
    models: Mapping[str, Any],
    suite: Suite | str = "clip13",
    *,
    out: str | Path,
    settings: EvalSettings | None = None,
    budgets: Sequence[float] | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
) -> Report:
    """Evaluate models on a suite.

    Args:
        models: name -> model, as for :func:`zepad_mm.evaluate`.
        suite: a name of ``SUITES``, or a suite of your own.
        out: folder of the reports, the plan and the lists of images.
        settings: attacks and numbers of images; None: the suite's preset. All splits are drawn from "test".
        budgets: in the place of the suite's.
        resume: continue a killed suite in ``out``, at the commits that it recorded.
        accelerator: as for :func:`zepad_mm.evaluate`.

    Returns:
        One report over all data sets and budgets, also written to ``out``; ``meta["suite"]`` holds the mean over the
        data sets.

    Raises:
        What :func:`zepad_mm.evaluate` raises; ValueError: ``out`` holds the plan of another suite.
    """
    about = SUITES.get(suite) if isinstance(suite, str) else suite
    name = suite if isinstance(suite, str) else "custom"
    settings = PRESETS.get(about.preset) if settings is None else settings
    settings = replace(settings, test_split=SPLIT, validation_split=SPLIT, surrogate_split=SPLIT)
    budgets = tuple(about.budgets if budgets is None else budgets)
    folder, started = output_folder(out), time.perf_counter()
    processes = Processes.of(accelerator)
    first = processes.first
    with claim_together(folder, accelerator):
        plan = processes.broadcast(_plan(folder, name, about, settings, resume) if first else {})
        reports = []
        for number, (task, source) in enumerate(plan["tasks"].items(), start=1):
            for budget in budgets:
                log.info("data set %d of %d: %s, budget %s", number, len(plan["tasks"]), task, _folder_name(budget))
                report = evaluate(
                    models=models,
                    tasks={task: source},
                    settings=replace(settings, epsilon=budget),
                    out=folder / task / _folder_name(budget),
                    resume=resume,
                    accelerator=accelerator,
                )
                reports.append(report)
            if first:
                _write_rows(folder, task, source, reports[-1], settings)
        meta = provenance(seed=settings.seed, config={"evaluation": settings.to_dict(), "suite": plan})
        meta["wall_s"] = round(time.perf_counter() - started, 2)
        joint = joined(reports, meta)
        joint.meta["suite"] = {"name": name, "about": about.about, "means": joint.means()}
        if first:
            joint.save(folder)
    return joint


def _plan(folder: Path, name: str, suite: Suite, settings: EvalSettings, resume: bool) -> dict[str, Any]:
    """Suite and pinned data sets: those recorded in the folder where a run is resumed."""
    path = folder / PLAN
    wanted = {"suite": name, "n": settings.n, "seed": settings.seed}
    if resume and path.is_file():
        plan: dict[str, Any] = read_json(path)
        if {key: plan.get(key) for key in wanted} != wanted or list(plan.get("tasks", {})) != list(suite.tasks):
            raise ValueError(f"{path} is of another run ({plan!s:.200}), expected {wanted}; give another --out")
        return plan
    tasks = {}
    for task, source in suite.tasks.items():
        shards = Webdataset.parse(source)
        tasks[task] = source if shards is None else str(shards.pinned())
    write_json(path, plan := {**wanted, "tasks": tasks})
    return plan


def _write_rows(folder: Path, task: str, source: str, report: Report, settings: EvalSettings) -> None:
    """The rows that were drawn, which follow from the name of the data set, the seed and the numbers alone."""
    images = report.meta["evaluations"][0]["config"]["images"]
    rows = rows_by_rule(images["name"], images["of"], settings)["test"]
    write_json(folder / IMAGES / f"{task}.json", {**images, "source": source, "seed": settings.seed, "rows": rows})


def _folder_name(budget: float) -> str:
    return f"{255 * budget:g}-255"
