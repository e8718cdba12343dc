"""The evaluation end to end, on small networks after a real training, some of it adversarial."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.toy_defence import CLASSES, SETTINGS, defended, eval_data
from zepad_mm.attacks import PGD, Perturbation
from zepad_mm.encoders import Encoder
from zepad_mm.evaluation import (
    PRESETS,
    EvalData,
    EvalSettings,
    Records,
    Report,
    acceptance,
    engine,
    evaluate,
    read_stage,
)
from zepad_mm.evaluation.plots import (
    confidence_figure,
    contact_sheet,
    frontier_figure,
    reader_name,
    roc_figure,
    tradeoff_figure,
    write_figures,
)
from zepad_mm.evaluation.report_text import summary
from zepad_mm.evaluation.session import Session
from zepad_mm.evaluation.subjects import subject_of
from zepad_mm.evaluation.threats import THREATS
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.fusion import Decision, Fusion, build, rule_names
from zepad_mm.models.gate import GateConfig, gate_for
from zepad_mm.models.zepad import DetectorConfig, ZePAD, ZePADConfig


@pytest.fixture(scope="module")
def model() -> ZePAD:
    return defended()


@pytest.fixture(scope="module")
def data() -> EvalData:
    return eval_data()


@pytest.fixture(scope="module")
def finished(model: ZePAD, data: EvalData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate(model, data=data, settings=SETTINGS, out=out), out


def test_report_has_the_documented_keys_rows_and_order(finished: tuple[Report, Path], model: ZePAD) -> None:
    report, out = finished
    written = json.loads((out / "report.json").read_text())
    assert set(written) == {"meta", "rows", "detection"}
    assert {"commit", "config", "seed", "hardware", "versions", "wall_s", "warnings"} <= set(written["meta"])
    assert Report.load(out) == Report.load(out / "report.json") == Report(**written)
    for row in written["rows"]:
        wanted = {"model", "attack", "threat", "epsilon", "norm", "dataset", "n", "accuracy", "ci_low", "ci_high"}
        assert wanted | {"seconds", "asr", "asr_correct"} <= set(row)
        assert row["n"] == 96
        assert 0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1
    rules = {f"zepad:{rule}" for rule in rule_names(gated=False)}
    branches = {f"branch:{name}" for name in model.branches}
    assert set(report.models) == {"undefended", "zepad", "baseline:equal"} | rules | branches
    for name in report.models:
        for threat in ("T1", "T1b", "T2"):
            assert report.accuracy(name, threat) <= report.accuracy(name)
        assert report.accuracy(name, "T1b") <= report.accuracy(name, "T1")
    for row in written["detection"]:
        wanted = {"model", "score", "threat", "attack", "auroc", "tpr_at_fpr1", "tpr_at_fpr5", "accuracy_paper_rule"}
        assert wanted | {"n"} <= set(row)
    assert {row["threat"] for row in written["detection"]} == {"T1", "T1b", "T2", "T3"}


def test_accuracies_order_models_as_expected(finished: tuple[Report, Path]) -> None:
    report, _ = finished
    assert report.accuracy("undefended") > 0.9
    assert report.accuracy("branch:benign", "T2") < 0.2
    assert report.accuracy("branch:robust_a", "T2") > 0.5
    # the prototypes' order: a bounded benign weight keeps what the robust branches hold, confidence weights lose it
    assert report.accuracy("zepad:rfdm", "T2") + 0.1 < report.accuracy("zepad", "T2")
    assert report.accuracy("undefended", "T1") < report.accuracy("undefended", "T1", "random_noise")
    # a rule is never better than under one attack of the pool
    pool = [row for row in report.rows if row["model"] == "zepad" and row["threat"] == "T2"]
    assert report.accuracy("zepad", "T2") <= min(row["accuracy"] for row in pool)
    names = {row["attack"] for row in pool}
    assert {"pgd@branch:benign", "pgd@robust_branches", "pgd@all_branches", "pgd@zepad"} <= names
    assert {f"pgd@zepad:{rule}" for rule in rule_names(gated=False) if rule != "bounded_benign"} <= names
    assert "pgd@zepad:bounded_benign" not in names  # the same rule as zepad's, attacked once
    assert any(name.startswith("feature_uap@") for name in names)
    # the shipped rule and its namesake share every example, so they must agree
    assert report.accuracy("zepad", "T2") == report.accuracy("zepad:bounded_benign", "T2")


def test_rows_can_be_recomputed_from_the_records(finished: tuple[Report, Path]) -> None:
    report, out = finished
    records = Records.load(out)
    again = {(row["model"], row["threat"], row["attack"]): row for row in records.rows()}
    for row in report.rows:
        assert again.pop((row["model"], row["threat"], row["attack"])) == row
    assert not again
    # and once more without the library's own arithmetic
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(out / "records.parquet").to_pydict()
    label = torch.tensor(table["label"])
    for model in report.models:
        for threat in report.threats:
            if threat in ("clean", "T3"):
                continue
            right = torch.tensor(table[f"{model}|clean/none"]) == label
            for column, values in table.items():
                start, _, key = column.partition("|")
                if start == model and key.split("/")[0] in THREATS[threat].counts and not key.endswith("random_noise"):
                    right &= torch.tensor(values) == label
            assert report.accuracy(model, threat) == pytest.approx(float(right.double().mean()))
    assert len(set(table["image"])) == len(label)


def test_recorded_predictions_match_the_model(finished: tuple[Report, Path], model: ZePAD, data: EvalData) -> None:
    """The cached logits are those of the modules on the same images."""
    _, out = finished
    records = Records.load(out)
    with torch.no_grad():
        assert records.predictions["zepad", "clean/none"].tolist() == model(data.test.images).argmax(-1).tolist()
        (file,) = (out / "perturbations").glob("feature_uap@undefended*")
        perturbation = Perturbation.load(file, SETTINGS.epsilon_universal)
        attacked = perturbation(data.test.images)
        key = "T1/feature_uap@undefended"
        assert records.predictions["undefended", key].tolist() == model.undefended(attacked).argmax(-1).tolist()
        equal = build("equal", model.benign)(model.branch_logits(attacked)).logits.argmax(-1)
        assert records.predictions["zepad:equal", key].tolist() == equal.tolist()
    assert read_stage(out, "T1", "feature_uap@undefended")["logits"].shape == (4, 96, 3)


def test_t3_attacks_lower_detection(finished: tuple[Report, Path]) -> None:
    report, out = finished
    records = Records.load(out)
    assert [row["model"] for row in report.rows if row["threat"] == "T3"] == ["zepad"] * 4
    # no better than without knowing it: right or flagged under every T2 example
    assert report.accuracy("zepad", "T3") >= report.accuracy("zepad", "T2")
    t2_only = torch.stack(
        [
            (records.predictions["zepad", a.key] == records.labels) | records.flagged[a.key]
            for a in records.attempts
            if a.threat in ("clean", "T2")
        ]
    ).all(0)
    assert report.accuracy("zepad", "T3") < float(t2_only.float().mean())  # the adaptive attacks add something
    adaptive = {row["score"]: row for row in report.detection if row["threat"] == "T3" and row["attack"] == "worst"}
    plain = {row["score"]: row for row in report.detection if row["attack"] == "first_success"}
    assert adaptive["jensen_shannon"]["auroc"] < plain["jensen_shannon"]["auroc"]
    assert adaptive["jensen_shannon"]["adaptive"]


def test_resume_repeats_only_unfinished_stages(
    finished: tuple[Report, Path], model: ZePAD, data: EvalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, out = finished
    again = tmp_path / "again"
    shutil.copytree(out, again)
    kept = sorted((again / "cache").glob("*.safetensors"))
    lost = again / "cache" / "T2_pgd@zepad_equal.safetensors"
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept if path != lost}
    resumed = evaluate(model, data=data, settings=SETTINGS, out=again, resume=True)
    assert lost.is_file()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    strip = [{key: value for key, value in row.items() if key != "seconds"} for row in resumed.rows]
    assert strip == [{key: value for key, value in row.items() if key != "seconds"} for row in report.rows]
    with pytest.raises(ValueError, match="another run: settings differ"):
        evaluate(model, data=data, settings=replace(SETTINGS, steps=7), out=again, resume=True)
    monkeypatch.setitem(engine.STAGES, "T1", engine.Stages(_killed, lambda session: 0))
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data=data, settings=SETTINGS, out=again)
    # without resume a run starts afresh: nothing stale is left to be taken for its own
    assert sorted(path.stem for path in (again / "cache").glob("*.safetensors")) == ["clean_none", "validation"]


def test_cache_folder_with_other_files_is_refused(model: ZePAD, data: EvalData, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "other.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match="something else than stages"):
        evaluate(model, data=data, settings=SETTINGS, threats="clean", out=tmp_path)
    assert (tmp_path / "cache" / "other.safetensors").read_bytes() == b"precious"


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_same_seed_gives_the_same_report_and_leaves_no_trace(model: ZePAD, data: EvalData) -> None:
    settings = replace(SETTINGS, threats=("T1", "T2"), n=32, rules=("equal",), diagnostics_n=0)
    state = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    first = evaluate(model, data=data, settings=settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for b in model.branches.values() for p in b.parameters())
    second = evaluate(model, data=data, settings=settings)
    assert [row["accuracy"] for row in first.rows] == [row["accuracy"] for row in second.rows]


class Broken(nn.Module):
    """A backbone behind a step that masks gradients."""

    def __init__(self, inner: nn.Module, step: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.step = step

    def forward(self, images: Tensor) -> Tensor:
        return self.step(self.inner, images)


def randomly_shifted(inner: nn.Module, images: Tensor) -> Tensor:
    """Test-time randomness; normalised pixels."""
    return inner(images + 0.5 * torch.randn_like(images))


# name -> the step, the head's factor, the check that must fail; None: the default attacks must break it
BROKEN: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], float, str | None]] = {
    "quantised input": (lambda inner, x: inner((x * 4).round() / 4), 1.0, "gradients"),
    "hard gate": (lambda inner, x: inner((x > 0).to(x.dtype)), 1.0, "gradients"),
    "detached": (lambda inner, x: inner(x.detach()) + 0 * x.flatten(1)[:, :1], 1.0, "gradients"),
    "random": (randomly_shifted, 1.0, "no_randomness"),
    "saturated": (lambda inner, x: inner(x), 1e6, None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_masked_gradients_are_broken_or_flagged(
    name: str, model: ZePAD, data: EvalData, finished: tuple[Report, Path]
) -> None:
    step, factor, check = BROKEN[name]
    benign = model.branch("benign")
    backbone = Broken(benign.encoder.backbone, step)
    encoder = Encoder(backbone, benign.encoder.preprocess, benign.encoder.feature_dim, "toy:broken")
    config = BranchConfig(name="broken", role="benign", source="toy:broken", head="linear")
    head = copy.deepcopy(benign.head)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(factor)
    branch = Branch(config, encoder, head)
    broken = ZePAD(ZePADConfig(public_source="toy:public", branches=(config,), class_names=CLASSES), [branch]).eval()
    broken.set_undefended(model.undefended)
    with torch.random.fork_rng():
        report = evaluate(broken, data=data, settings=replace(SETTINGS, threats=("T1", "T2"), rules=("equal",)))
    found = {check["name"]: check["passed"] for check in report.meta["diagnostics"]}
    if check is None:
        plain_pgd = PGD(loss="ce", epsilon=SETTINGS.epsilon, steps=SETTINGS.steps, random_start=False)
        attacked = plain_pgd(branch, data.test.images, data.test.labels)
        assert float((branch(attacked).argmax(-1) == data.test.labels).float().mean()) > 0.5  # as plain PGD reports
        at_most = finished[0].accuracy("branch:benign", "T2") + 0.03
        assert report.accuracy("zepad", "T2") <= at_most or not found["more_steps"]
        assert report.accuracy("zepad", "T2") < 0.3
        return
    assert not found[check], report.meta["diagnostics"]
    assert any(f"({check})" in text for text in report.meta["warnings"])
    assert report.doubted
    assert "likely overestimated" in report.markdown().splitlines()[0]


@dataclass(frozen=True)
class Leaking(Fusion):
    """A detector that reads the true labels of the test images, by their place in the batch."""

    labels: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)

    def __call__(self, branch_logits: Tensor) -> Decision:
        decision = super().__call__(branch_logits)
        wrong = decision.logits.argmax(-1) != self.labels[: branch_logits.shape[1]]
        return replace(decision, score=wrong.float())


def test_detector_that_leaks_labels_is_flagged(data: EvalData) -> None:
    model = defended().set_detector(DetectorConfig(threshold=0.5))
    model.fusion = Leaking(model.fusion.rule, model.fusion.benign, labels=data.test.labels)
    settings = replace(SETTINGS, threats=("T2", "T3"), rules=("equal",), diagnostics_n=0)
    report = evaluate(model, data=data, settings=settings)
    assert report.accuracy("zepad", "T3") > report.accuracy("zepad", "T2") + 0.1  # it seems to help
    assert report.doubted
    (check,) = [check for check in report.meta["diagnostics"] if check["name"] == "independent_of_batch"]
    assert not check["passed"]


class Killed(BaseException):
    """An interruption that no handler catches, as a kill."""


def test_killed_twenty_times_and_resumed_gives_the_same_report(
    model: ZePAD, data: EvalData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"feature_uap": 4}
    settings = replace(SETTINGS, n=24, batch_size=12, steps=2, detector_steps=2, diagnostics_n=6, universal_steps=few)
    settings = replace(settings, family_steps=few, rules=("rfdm", "equal"))
    out, killed = tmp_path / "whole", tmp_path / "killed"
    whole = evaluate(model, data=data, settings=settings, out=out)
    forward, moments = Branch.forward, torch.Generator().manual_seed(0)
    redone: dict[str, int] = {}
    batch = Session.batch

    def counted(self: Session, name: str, number: int, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        def noted() -> torch.Tensor:
            result = work()
            redone[f"{name} {number}"] = redone.get(f"{name} {number}", 0) + 1
            return result

        return batch(self, name, number, noted)

    monkeypatch.setattr(Session, "batch", counted)
    for _ in range(20):
        left = int(torch.randint(20, 80, (), generator=moments))

        def killing(self: Branch, images: torch.Tensor) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return forward(self, images)

        monkeypatch.setattr(Branch, "forward", killing)
        with contextlib.suppress(Killed):
            evaluate(model, data=data, settings=settings, out=killed, resume=True)
    monkeypatch.setattr(Branch, "forward", forward)
    resumed = evaluate(model, data=data, settings=settings, out=killed, resume=True)
    drop = ("seconds",)
    assert [{k: v for k, v in row.items() if k not in drop} for row in resumed.rows] == [
        {k: v for k, v in row.items() if k not in drop} for row in whole.rows
    ]
    before, after = Records.load(out), Records.load(killed)
    assert before.predictions.keys() == after.predictions.keys()
    assert all(torch.equal(before.predictions[key], after.predictions[key]) for key in before.predictions)
    stages = [key for key in redone if not key.startswith(("sweep", "transfer", "more steps"))]
    assert stages
    assert all(redone[key] == 1 for key in stages)  # no finished batch was done twice


def test_diagnostics_pass_without_masked_gradients(finished: tuple[Report, Path]) -> None:
    report, _ = finished
    found = {check["name"]: check for check in report.meta["diagnostics"]}
    assert set(found) == {
        "finite",
        "robust_not_above_clean",
        "outputs_are_logits",
        "no_randomness",
        "noise_not_stronger_than_t2",
        "noise_weaker_than_t1",
        "t1_not_weaker_than_t1b",
        "gradients",
        "independent_of_batch",
        "more_steps",
        "budget_sweep",
        "transfer_not_stronger",
    }
    for name in ("finite", "robust_not_above_clean", "noise_weaker_than_t1", "gradients", "budget_sweep"):
        assert found[name]["passed"], found[name]


def test_gated_model_is_attacked_and_judged_through_its_gate(data: EvalData) -> None:
    """Its gate is one more row of all cached logits; both policies are measured on one model."""
    model = defended()
    torch.manual_seed(0)
    widths = [branch.encoder.feature_dim for branch in map(model.branch, model.branches)]
    model.set_gate(gate_for(widths, model.benign, GateConfig(threshold=0.0)))
    model.config = replace(model.config, policy_caps={"zero_sacrifice": 1.0, "white_box": 0.2})
    model.set_fusion("gated").set_detector(DetectorConfig(score="feature_gate"))
    quick = {"own_attacks": ("pgd",), "adaptive": ("weight_hijack", "mora"), "evasion": ("selective",), "steps": 2}
    shown = {"threats": ("clean", "T2", "T3"), "rules": ("gated", "equal"), "policy": "white_box"}
    settings = replace(SETTINGS, **quick, **shown, detector_steps=2, diagnostics_n=0)  # type: ignore[arg-type]
    subject = subject_of(model, rules=("gated", "equal"), policy="white_box")
    session = Session(subject, data, settings)
    logits = session.score(data.test.images[:8])
    with torch.no_grad():
        expected = model.branch_logits(data.test.images[:8])
    torch.testing.assert_close(session.branch_logits(logits), expected, atol=1e-4, rtol=1e-4)
    fused = model.set_policy("white_box").decide(data.test.images[:8]).logits
    torch.testing.assert_close(session.default.answer(logits), fused, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(session.view(session.default)(data.test.images[:8]), fused, atol=1e-4, rtol=1e-4)
    report = evaluate(model.set_policy("zero_sacrifice"), data=data, settings=settings)
    assert report.meta["config"]["model"]["policy"] == "white_box"
    assert {"zepad", "zepad:gated", "zepad:equal"} <= {row["model"] for row in report.rows}
    assert {(row["score"], row["threat"]) for row in report.detection} >= {
        ("feature_gate", "T2"),
        ("feature_gate", "T3"),
    }


def test_skipped_rules_have_an_upper_bound(
    finished: tuple[Report, Path], model: ZePAD, data: EvalData, tmp_path: Path
) -> None:
    full, _ = finished
    report = evaluate(model, data=data, settings=replace(SETTINGS, skip_settled=True, diagnostics_n=0), out=tmp_path)
    bounds = {name: report.row(name, "T2")["upper_bound"] for name in report.models}
    assert any(bounds.values())
    assert not bounds["zepad"]
    own = {row["attack"] for row in report.rows if row["threat"] == "T2"}
    for name, bounded in bounds.items():
        assert report.accuracy(name, "T2") >= full.accuracy(name, "T2")
        if bounded:
            assert f"pgd@{name}" not in own
            assert report.accuracy(name, "T2") < report.accuracy("zepad", "T2")
    assert "<= " in report.markdown()
    assert set(Records.load(tmp_path).skipped) == {name for name, bounded in bounds.items() if bounded}


def test_full_preset_runs_every_attack(model: ZePAD, data: EvalData) -> None:
    full = PRESETS.get("full")
    few = dict.fromkeys(full.universal, 2)
    settings = replace(
        full, n=4, steps=2, restarts=1, square_queries=3, detector_steps=2, diagnostics_n=2, n_surrogate=16, targets=2,
        universal_steps=few, family_steps=dict.fromkeys(full.universal_family, 2), rules=("rfdm",),
    )  # fmt: skip
    report = evaluate(model, data=data, settings=settings)
    ran = {row["attack"] for row in report.rows}
    assert {f"{name}@undefended" for name in full.universal} <= ran
    elsewhere = {"prompts", "patch_tokens"}  # for zero-shot heads; on each encoder
    own = [name for name in full.own_attacks if name not in elsewhere]
    assert {f"{kind}@zepad" for kind in (*own, *full.adaptive, *full.evasion)} <= ran
    assert {f"patch_tokens@{name}:own" for name in report.models if name.startswith("branch:")} <= ran
    assert {f"{kind}@undefended 4/255" for kind in full.transfer} <= ran
    assert {check["name"] for check in report.meta["diagnostics"]} >= {"square_not_stronger", "no_randomness"}


def test_baselines_and_a_choice_of_threat_models(model: ZePAD, data: EvalData) -> None:
    settings = replace(SETTINGS, diagnostics_n=0, rules=("equal",))
    report = evaluate(
        model, data=data, settings=settings, threats=["T2"], n=20, baselines={"public_twin": model.undefended}
    )
    assert report.threats == ["clean", "T2"]
    assert report.accuracy("baseline:public_twin", "T2") == report.accuracy("undefended", "T2")
    assert report.row("zepad")["n"] == 20
    assert not any(
        row["attack"].startswith("pgd@baseline:public_twin") for row in report.rows
    )  # one network, one attack
    clean = evaluate(model, data=data, settings=settings, threats="clean", n=20)
    assert "No white-box attack was run" in clean.markdown()


def test_report_text_has_a_table_per_threat_model_and_a_summary(finished: tuple[Report, Path]) -> None:
    report, out = finished
    text = (out / "report.md").read_text()
    for heading in ("T1: ", "T1b: ", "T2: ", "Detection", "In plain words"):
        assert f"## {heading}" in text
    shown = f"{100 * report.accuracy('zepad', 'T2'):.1f}"
    words = "\n".join(summary(report))
    assert f"leaves {shown} % right with the defence" in words
    assert "its best branch `branch:robust" in words
    assert "nan" not in text.lower().replace("nano", "")
    with pytest.raises(KeyError, match="models: undefended, zepad"):
        report.accuracy("missing")


def _report(**accuracies: float) -> Report:
    rows = []
    for key, accuracy in accuracies.items():
        model, threat = key.split("__")
        attack = "none" if threat == "clean" else "worst"
        kind = {"undefended": "undefended", "zepad": "default"}.get(model, "branch")
        model = model.replace("branch_", "branch:")
        rows.append({"model": model, "kind": kind, "threat": threat, "attack": attack, "accuracy": accuracy})
    return Report({"warnings": []}, rows)


def test_acceptance_names_missed_criteria() -> None:
    good = {
        "undefended__clean": 0.7,
        "zepad__clean": 0.695,
        "undefended__T1": 0.4,
        "zepad__T1": 0.6,
        "zepad__T2": 0.31,
        "branch_a__T2": 0.32,
    }
    assert acceptance(_report(**good)) == []
    for change, message in (
        ({"zepad__clean": 0.68}, "2.0 points below undefended on clean"),
        ({"undefended__T1": 0.5, "zepad__T1": 0.7}, "the attack is weak"),
        ({"zepad__T1": 0.5}, "gains 10.0 points"),
        ({"zepad__T2": 0.29}, "3.0 points below its best branch"),
    ):
        (failure,) = acceptance(_report(**{**good, **change}))
        assert message in failure


def test_contact_sheet_shows_the_images_that_its_titles_name(
    finished: tuple[Report, Path], model: ZePAD, data: EvalData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report, out = finished
    shutil.copytree(out, tmp_path / "out")
    shown: list[tuple[torch.Tensor, list[str]]] = []

    def recorded(clean: torch.Tensor, attacked: torch.Tensor, truth: list[str], *rest: object) -> object:
        shown.append((clean, truth))
        return contact_sheet(clean, attacked, truth, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("zepad_mm.evaluation.plots.contact_sheet", recorded)
    turned = replace(data, test=data.test.subset(torch.arange(len(data.test)).flip(0)))  # as some presets shuffle
    write_figures(report, tmp_path / "out", model, turned, count=6)
    ((clean, truth),) = shown
    names = data.test.class_names
    for image, name in zip(clean, truth, strict=True):
        (row,) = (data.test.images == image).flatten(1).all(1).nonzero().flatten().tolist()
        assert names[int(data.test.labels[row])] == name


def test_write_figures_draws_every_plot(
    finished: tuple[Report, Path], model: ZePAD, data: EvalData, tmp_path: Path
) -> None:
    report, out = finished
    shutil.copytree(out, tmp_path / "out")
    paths = write_figures(report, tmp_path / "out", model, data, count=3)
    names = ["accuracy", "budget", "confidence", "contact_sheet", "frontier", "roc"]
    assert sorted(path.name for path in paths) == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    (panel,) = tradeoff_figure(report).axes
    assert [text.get_text() for text in panel.get_xticklabels()] == list(map(reader_name, report.models))
    places = {text.get_text(): text.xy for text in frontier_figure(report).axes[0].texts}
    assert places["defended"] == pytest.approx((100 * report.accuracy("zepad"), 100 * report.accuracy("zepad", "T2")))
    clean, scores = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.25, 0.4])
    assert "AUROC 0.833" in roc_figure(clean, {"T1": scores}, "score").axes[0].get_legend().get_texts()[0].get_text()
    with pytest.raises(ValueError, match="scores of clean images"):
        roc_figure(clean, {"T1": torch.empty(0)}, "score")
    logits = torch.randn(2, 5, 3)
    assert len(confidence_figure({"clean": logits, "T1": logits}, ("a", "b"), (True, False)).axes) == 2
    images = torch.rand(2, 3, 8, 8)
    assert len(contact_sheet(images, images, ("x", "y"), {"zepad": ("x", "z")}).axes) == 6
    with pytest.raises(ValueError, match="as many attacked images"):
        contact_sheet(images, images[:1], ("x", "y"), {})


def test_settings_and_data_reject_mistakes(model: ZePAD, data: EvalData) -> None:
    for preset in PRESETS:
        assert EvalSettings.from_dict(PRESETS.get(preset).to_dict()) == PRESETS.get(preset)
    for bad, message in (
        ({"threats": ("T4",)}, "unknown threat 'T4'"),
        ({"epsilon": 4.0}, "write 8/255, not 8"),
        ({"epsilon": 0.0}, "positive budget"),
        ({"rules": ("rfmd",)}, "did you mean 'rfdm'"),
        ({"universal": ("uapp",)}, "did you mean 'uap'"),
        ({"universal": ("adv_clip",)}, "is a patch"),
        ({"own_attacks": ("autoattack",)}, "own_attacks"),
        ({"n": 0}, "n: expected at least 1"),
        ({"steps": 0}, "steps: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            EvalSettings(**bad)
    other = replace(data, test=replace(data.test, class_names=("a", "b", "c")))
    with pytest.raises(ValueError, match="set_classes"):
        evaluate(model, data=other, settings=SETTINGS)
    with pytest.raises(ValueError, match="unknown evaluation preset"):
        evaluate(model, data=data, settings="fast")


def test_load_takes_embedded_splits_and_halves_of_train(tmp_path: Path) -> None:
    settings = replace(SETTINGS, n=5, n_validation=6, n_surrogate=7)
    embedded = EvalData.load("embedded", settings)
    assert (len(embedded.test), len(embedded.validation), len(embedded.surrogate)) == (5, 6, 7)
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 2)):
        for name in ("a", "b"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = (torch.rand(8, 8, 3, generator=generator) * 255).byte().numpy()
                Image.fromarray(pixels).save(folder / f"{index}.png")
    found = EvalData.load(str(tmp_path), replace(settings, n=None, image_size=8))
    assert (len(found.test), len(found.validation), len(found.surrogate)) == (4, 6, 6)
    seen = {image.numpy().tobytes() for image in found.validation.images}
    assert not seen & {image.numpy().tobytes() for image in found.surrogate.images}
