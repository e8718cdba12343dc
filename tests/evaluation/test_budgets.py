"""Budgets beside L-inf: L2 for the white-box attack, areas for patches, files of published perturbations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.toy_defence import SETTINGS, SIZE, defended, eval_data
from zepad_mm.attacks import Perturbation
from zepad_mm.evaluation import PRESETS, EvalData, EvalSettings, Records, Report, evaluate
from zepad_mm.evaluation.plots import write_figures
from zepad_mm.models.zepad import ZePAD

L2 = 1.5


@pytest.fixture(scope="module")
def model() -> ZePAD:
    return defended()


@pytest.fixture(scope="module")
def data() -> EvalData:
    return eval_data()


@pytest.fixture(scope="module")
def finished(model: ZePAD, data: EvalData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("evaluation")
    stripes = 0.5 * (2 * torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) - 1)
    np.save(out.parent / "published.npy", stripes.numpy())
    settings = replace(
        SETTINGS,
        threats=("clean", "T1", "T1p", "T2", "T3"),
        norm="l2",
        epsilon=L2,
        area=0.15,
        patches=("adv_clip",),
        universal_steps={"feature_uap": 20, "adv_clip": 5},
        published=(str(out.parent / "published.npy"),),
        own_attacks=("pgd", "pgd_from_t1", "apgd_targeted", "square"),
        rules=("rfdm",),
        detector_steps=2,
        evasion=("selective",),
    )
    return evaluate(model, data=data, settings=settings, out=out), out


def test_rows_hold_the_budget_of_their_threat_model(finished: tuple[Report, Path]) -> None:
    report, out = finished
    budgets = {
        threat: {(row["norm"], row["epsilon"]) for row in report.rows if row["threat"] == threat}
        for threat in report.threats
    }
    assert budgets["T1"] == {("linf", 10 / 255)}
    assert budgets["T1p"] == {("patch", 0.15)}
    assert budgets["T2"] == {("l2", L2)}
    assert {row["norm"] for row in report.rows if row["threat"] == "T3" and row["attack"] != "none"} == {"l2"}
    text = report.markdown()
    for shown in ("(10/255)", "(15 % of the area)", "(L2 1.5)"):
        assert shown in text
    assert {attempt.norm for attempt in Records.load(out).attempts} == {"linf", "patch", "l2"}


def test_l2_attack_lowers_accuracy_within_its_budget(finished: tuple[Report, Path], data: EvalData) -> None:
    report, _ = finished
    assert report.accuracy("undefended", "T2") < 0.2
    assert report.accuracy("zepad", "T2") < report.accuracy("zepad") - 0.1
    sweep = next(check for check in report.meta["diagnostics"] if check["name"] == "budget_sweep")
    assert list(sweep["values"]) == ["L2 1.5", "L2 3", "L2 6", "L2 24"]
    assert "square@zepad" not in {row["attack"] for row in report.rows}


def test_patches_have_a_random_patch_as_control(finished: tuple[Report, Path]) -> None:
    report, out = finished
    rows = {row["attack"]: row for row in report.rows if row["threat"] == "T1p" and row["model"] == "undefended"}
    assert set(rows) == {"random_patch", "adv_clip@undefended", "worst"}
    assert rows["random_patch"]["control"]
    assert rows["worst"]["accuracy"] <= rows["adv_clip@undefended"]["accuracy"]
    made = Perturbation.load(out / "perturbations" / "adv_clip@undefended.safetensors", 0.15)
    assert made.norm == "patch"


def test_published_perturbation_is_clipped_to_the_budget_of_t1(
    finished: tuple[Report, Path], model: ZePAD, data: EvalData
) -> None:
    report, out = finished
    raw = torch.from_numpy(np.load(out.parent / "published.npy"))
    attacked = (data.test.images + raw.clamp(-10 / 255, 10 / 255)).clamp(0, 1)
    with torch.no_grad():
        right = (model(attacked).argmax(-1) == data.test.labels).float().mean()
    assert report.accuracy("zepad", "T1", "published:published") <= float(right) + 1e-6
    used = Perturbation.load(out / "perturbations" / "published_published.safetensors", 10 / 255)
    assert used.provenance["restore"] in ("original", "rescale", "sign")


def test_write_figures_draws_an_l2_evaluation(finished: tuple[Report, Path], model: ZePAD, data: EvalData) -> None:
    report, out = finished
    assert {path.name for path in write_figures(report, out, model, data)} >= {"accuracy.png", "budget.png"}


def test_settings_reject_wrong_budgets() -> None:
    for bad, message in (
        ({"norm": "l1"}, "norm: expected one of linf, l2"),
        ({"norm": "l2", "epsilon": -1.0}, "L2 length"),
        ({"area": 3.0}, "share of the area"),
        ({"patches": ("uap",)}, "patches: expected names of"),
        ({"threats": ("T1p",), "patches": ()}, "patches: expected at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalSettings(**bad)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"missing\.npy"):
        evaluate("embedded", settings=replace(PRESETS.get("smoke"), n=2, published=("missing.npy",), threats=("T1",)))
