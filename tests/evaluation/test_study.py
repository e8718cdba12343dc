"""Several models on several tasks: what each kind of model gets, what is shared, and what a killed study keeps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.toy_defence import CLASSES, SETTINGS, defended, eval_data, toy
from zepad_mm.attacks.universal import feature_uap
from zepad_mm.evaluation import EvalData, Report, RowKind, evaluate, subject_of
from zepad_mm.evaluation.report_text import summary
from zepad_mm.evaluation.subjects import Row, Subject, first_logits
from zepad_mm.models.zepad import ZePAD

FEW = replace(
    SETTINGS,
    threats=("clean", "T1", "T2"),
    n=16,
    n_validation=16,
    rules=("rfdm",),
    pools=("branch",),
    adaptive=("average_logit",),
    universal_steps={"feature_uap": 3},
    family_steps={"feature_uap": 3},
    steps=2,
    diagnostics_n=0,
)


@pytest.fixture(scope="module")
def model() -> ZePAD:
    return defended()


@pytest.fixture(scope="module")
def data() -> EvalData:
    return eval_data()


def plain(model: ZePAD) -> nn.Module:
    branch = model.branch("robust_a")
    return nn.Sequential(branch.encoder, branch.head)


def test_study_reports_every_model_on_every_task(model: ZePAD, data: EvalData, tmp_path: Path) -> None:
    other = replace(data, test=toy(20, 11))
    public = model.undefended
    seen = []

    def per_task(task: str, images: EvalData) -> tuple[nn.Module, nn.Module]:
        seen.append((task, images.test.class_names))
        return public.encoder, public.head

    models = {"ours": model, "branch": model.branch("benign"), "public": per_task, "plain": plain(model)}
    report = evaluate(models=models, tasks={"toy": data, "other": other}, settings=FEW, out=tmp_path)
    assert seen == [("toy", CLASSES), ("other", CLASSES)]
    assert report.datasets == ["toy", "other"]
    assert set(report.models_of(RowKind.DEFAULT)) == set(models)
    assert {"ours/branch:benign", "ours/undefended", "ours/zepad:rfdm"} <= set(report.models)
    for task in report.datasets:
        assert report.row("plain", "T2", dataset=task)["accuracy"] <= report.accuracy("plain", dataset=task)
        # the public encoder with its head is what the defence calls undefended, attacked by the same perturbation
        name = "feature_uap@undefended"
        here, there = (report.row(model, "T1", name, task) for model in ("public", "ours/undefended"))
        assert here["accuracy"] == there["accuracy"]
        with pytest.raises(KeyError):
            report.row("plain", "T1", dataset=task)  # no public encoder: T1 does not apply
    (skipped,) = [part for part in report.meta["evaluations"] if (part["model"], part["task"]) == ("plain", "toy")]
    assert skipped["not_applicable"] == {"T1": "it has no public encoder"}
    assert {row["model"] for row in report.detection} == {"ours"}
    assert Report.load(tmp_path).rows == report.rows
    assert Report.load(tmp_path / "ours" / "toy").accuracy("zepad") == report.accuracy("ours", dataset="toy")
    assert "`ours/branch:benign`" in (tmp_path / "report.md").read_text()


def test_study_crafts_shared_perturbations_once_and_keeps_finished_pairs(
    model: ZePAD, data: EvalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crafted = []
    fit = feature_uap.FeatureUAP.fit

    def counted(self: feature_uap.FeatureUAP, *args: object, **options: object) -> object:
        crafted.append(self)
        return fit(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(feature_uap.FeatureUAP, "fit", counted)
    settings = replace(FEW, threats=("clean", "T1"))
    tasks = {"toy": data, "other": replace(data, test=toy(20, 11))}
    public = (model.undefended.encoder, model.undefended.head)
    models = {"ours": model, "public": public}
    first = evaluate(models=models, tasks=tasks, settings=settings, out=tmp_path)
    assert len(crafted) == 1
    again = evaluate(models=models, tasks=tasks, settings=settings, out=tmp_path, resume=True)
    assert len(crafted) == 1
    assert again.rows == first.rows  # with their seconds: read, not repeated
    (tmp_path / "public" / "other" / "report.json").unlink()
    third = evaluate(models=models, tasks=tasks, settings=settings, out=tmp_path, resume=True)
    assert [row["accuracy"] for row in third.rows] == [row["accuracy"] for row in first.rows]


def test_subject_by_hand_shares_networks_between_rows(model: ZePAD, data: EvalData) -> None:
    subject = subject_of(model, rules=("rfdm",)).with_fused_row(
        "robust", ["branch:robust_a", "branch:robust_b"], "equal"
    )
    report = evaluate(subject, data=data, settings=FEW, threats="clean")
    with torch.no_grad():
        logits = torch.stack([model.branch(name)(data.test.images) for name in ("robust_a", "robust_b")])
    answers = subject.rows[-1].combine(logits).argmax(-1)
    wanted = float((answers == data.test.labels).float().mean())
    assert report.row("baseline:robust")["kind"] == RowKind.BASELINE
    assert report.accuracy("baseline:robust") == pytest.approx(wanted, abs=0.2)  # on a sample of these images
    with pytest.raises(ValueError, match="no member 'branch:nobody'"):
        subject.with_fused_row("bad", ["branch:nobody"], "equal")
    with pytest.raises(ValueError, match="as it ships first"):
        Subject(members=subject.members, rows=(Row("x", (0,), first_logits),))


def test_single_models_get_what_applies(model: ZePAD, data: EvalData) -> None:
    report = evaluate(plain(model), data=data, settings=FEW, threats=("T1", "T1b", "T2", "T3"))
    assert report.threats == ["clean", "T2"]
    assert report.models == ["model"]
    assert set(report.meta["not_applicable"]) == {"T1", "T1b", "T3"}
    assert report.detection == []
    first, attacked, *_ = summary(report)
    assert re.fullmatch(r"Without an attack: \d+\.\d % of the answers are right\.", first)
    assert re.search(
        r"\) leaves \d+\.\d % of the answers right with one attack: \d+\.\d % of the right answers are lost\.", attacked
    )


def test_plain_clip_by_source_has_zero_shot_heads() -> None:
    source = "open_clip:embedded?image_size=64"
    report = evaluate(source, settings=replace(FEW, n=8, n_surrogate=16))
    assert report.threats == ["clean", "T1", "T2"]
    assert report.meta["config"]["source"] == source
    assert report.row("model", "T1", "feature_uap@undefended")["target"] == "undefended"


def test_evaluate_rejects_missing_and_unknown_models(model: ZePAD, data: EvalData) -> None:
    for options in ({}, {"model": model, "models": {"a": model}}):
        with pytest.raises(ValueError, match="either a model or models="):
            evaluate(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a ZePAD, a source string, a Branch"):
        evaluate(3, data=data)
