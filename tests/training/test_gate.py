"""Training of the feature gate: real images, resumption, calibration, seeds, files and errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes import train_gate as train_gate_recipe
from recipes.train_gate import Recipe
from tests.training.test_fit import tiny_encoder
from zepad_mm.attacks.gate_aware import GateAwarePGD
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.encoders import Encoder
from zepad_mm.models.gate import FeatureGate
from zepad_mm.training import GateSettings, load_gate, train_gate, write_gate
from zepad_mm.training.gate import split_pool
from zepad_mm.training.gate_examples import ExampleMaker
from zepad_mm.training.gate_images import ImagePool, corruption
from zepad_mm.utils import progress
from zepad_mm.utils.io import read_json, read_tensors

SETTINGS = GateSettings(
    corruptions=("gaussian_noise", "contrast", "crop_flip", "downscale"),
    corrupted_views=1,
    universal=("feature_uap",),
    held_out="uapgd",
    universal_steps=8,
    universal_budgets=(12 / 255, 16 / 255),
    universal_views=1,
    per_image=("pgd:feature_l2", "apgd:margin"),
    per_image_n=64,
    per_image_steps=3,
    per_image_budgets=(8 / 255, 12 / 255),
    stopped_n=32,
    rounds=2,
    round_n=32,
    round_steps=3,
    least_change=0.0,
    steps=100,
    hidden=32,
)


class Blurred(nn.Module):
    """A stand-in for a robust encoder: the same network on blurred images, which hardly sees fine perturbations."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1))


@pytest.fixture(scope="module")
def photos() -> dict[str, LabelledImages]:
    return {name: load_data("embedded", name, 12, n, 0) for name, n in (("train", 200), ("validation", 100))}


def encoders() -> tuple[Encoder, Encoder]:
    benign, other = tiny_encoder(), tiny_encoder()
    return benign, Encoder(Blurred(other.backbone), other.preprocess, other.feature_dim, "test:blurred").eval()


def trained(photos: dict[str, LabelledImages], **more: Any) -> tuple[FeatureGate, dict[str, Any]]:
    benign, robust = encoders()
    settings = replace(SETTINGS, **more.pop("settings", {}))
    return train_gate(benign, [robust], {"train": photos["train"]}, settings, **more)


def same(one: FeatureGate, other: FeatureGate) -> bool:
    states = one.state_dict(), other.state_dict()
    return one.config == other.config and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.fixture(scope="module")
def whole(photos: dict[str, LabelledImages]) -> tuple[FeatureGate, dict[str, Any]]:
    return trained(photos, calibration={"validation": photos["validation"]})


def test_train_gate_detects_attacks_and_spares_clean_images(whole: tuple[FeatureGate, dict[str, Any]]) -> None:
    gate, record = whole
    assert not gate.training
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert record["mean_auroc"] > 0.65
    assert record["attacks"]["universal: feature_uap"]["auroc"] > 0.7
    assert record["clean_weight"] > 0.8
    assert record["attacks"]["universal: feature_uap"]["weight"] < record["clean_weight"]
    assert gate.config.seen_attacks == ("feature_uap", "uapgd", "pgd", "apgd", "gate_aware")
    assert {"train", "validation", *SETTINGS.corruptions} == set(record["false_alarms"])
    json.dumps(record, allow_nan=False)


def test_thresholds_are_quantiles_of_images_that_were_not_trained_on(
    whole: tuple[FeatureGate, dict[str, Any]], photos: dict[str, LabelledImages]
) -> None:
    gate, record = whole
    benign, robust = encoders()
    pool = ImagePool(photos)
    parts = split_pool(pool, ["train"], SETTINGS)
    rows = torch.cat([parts.train, parts.validation, parts.calibration, parts.unseen])
    assert len(rows) == len(rows.unique()) == 300
    assert not torch.isin(torch.cat([parts.train, parts.validation]), pool.rows("validation")).any()
    images = pool.fetch(parts.calibration)
    with torch.no_grad():
        scores = gate(benign(images), [robust(images)])
    for name, rate in (("gating", SETTINGS.gating_rate), ("detection", SETTINGS.detection_rate)):
        alarms = int((scores > record["thresholds"][name] + 1e-4).sum())
        assert int(rate * len(scores)) - 1 <= alarms <= int(rate * len(scores))
    assert record["thresholds"]["gating"] == gate.config.threshold > record["thresholds"]["detection"]
    assert record["false_alarms"]["validation"]["n"] == 50


def test_several_sets_make_thresholds_stricter_for_sets_never_seen(photos: dict[str, LabelledImages]) -> None:
    """One of the sets is blurred, so that its features differ: a gate that has not seen it gives more false alarms."""
    images = photos["train"].images
    shifted = F.avg_pool2d(F.pad(images.flip(1), (2, 2, 2, 2), mode="reflect"), 5, 1)
    benign, robust = encoders()
    settings = replace(SETTINGS, rounds=0, per_image_n=0, stopped_n=0)
    gate, record = train_gate(benign, [robust], {"as they are": images, "shifted": shifted}, settings)
    assert set(record["false_alarms_of_sets_left_out"]) == {"gating", "detection"}
    for name, rate in (("gating", settings.gating_rate), ("detection", settings.detection_rate)):
        assert 0 < record["quantiles"][name] <= rate
        strict = record["quantiles"][name] < rate
        assert strict == (record["false_alarms_of_sets_left_out"][name] > rate)
    assert gate.config.threshold == record["thresholds"]["gating"]


def test_worst_gating_rate_bounds_the_false_alarms_of_every_set(photos: dict[str, LabelledImages]) -> None:
    """Negatives of photos are a calibration set. Of both sets together 30 % may be taken for attacked."""
    images, (benign, robust) = photos["train"].images, encoders()
    shifted = 1 - photos["validation"].images
    settings = replace(SETTINGS, rounds=0, per_image_n=0, stopped_n=0, gating_rate=0.3)
    pool = ImagePool({"train": images, "shifted": shifted})
    parts = split_pool(pool, ["train"], settings)
    own = pool.fetch(parts.calibration[torch.isin(parts.calibration, pool.rows("shifted"))])
    gates, alarms = [], []
    for rate in (None, 0.05):
        settings = replace(settings, worst_gating_rate=rate)
        gate, record = train_gate(benign, [robust], {"train": images}, settings, calibration={"shifted": shifted})
        scores = gate(benign(own), [robust(own)])
        gates.append(gate)
        alarms.append(float((scores > gate.config.threshold + 1e-4).float().mean()))
        assert record["thresholds"]["gating"] == gate.config.threshold
    assert torch.equal(gates[0](benign(own), [robust(own)]), gates[1](benign(own), [robust(own)]))
    assert alarms[0] > 0.05 >= alarms[1]


def test_same_seed_gives_the_same_gate_and_another_seed_another(
    whole: tuple[FeatureGate, dict[str, Any]], photos: dict[str, LabelledImages]
) -> None:
    before = torch.get_rng_state()
    assert same(whole[0], trained(photos, calibration={"validation": photos["validation"]})[0])
    assert torch.equal(before, torch.get_rng_state())
    assert not same(whole[0], trained(photos, settings={"seed": 1, "rounds": 0})[0])


def test_labels_are_not_read(photos: dict[str, LabelledImages]) -> None:
    data = photos["train"]
    unlabelled = replace(data, labels=torch.full_like(data.labels, -1), class_names=())
    few = {"rounds": 0, "per_image_n": 0, "stopped_n": 0}
    gates = [trained({"train": images}, settings=few)[0] for images in (data, unlabelled)]
    assert same(*gates)


def _killed(photos: dict[str, LabelledImages], out: Path) -> None:
    original = ExampleMaker.gate_aware

    def gate_aware(self: ExampleMaker, gate: FeatureGate, rows: Tensor, kind: str) -> Any:
        if kind.startswith("1"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, gate, rows, kind)

    ExampleMaker.gate_aware = gate_aware  # type: ignore[method-assign]
    trained(photos, calibration={"validation": photos["validation"]}, out=out)


def test_killed_run_resumes_to_the_same_gate(
    whole: tuple[FeatureGate, dict[str, Any]],
    photos: dict[str, LabelledImages],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(photos, tmp_path))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert tmp_path / "cache" / "gate-aware_0_train.safetensors" in kept
    with pytest.raises(ValueError, match=r"settings.seed differ"):
        trained(photos, settings={"seed": 5}, calibration={"validation": photos["validation"]}, out=tmp_path)
    encoded = []
    encode = ExampleMaker.encode
    monkeypatch.setattr(
        ExampleMaker, "encode", lambda self, images: encoded.append(len(images)) or encode(self, images)
    )
    gate, _ = trained(photos, calibration={"validation": photos["validation"]}, out=tmp_path)
    assert same(whole[0], gate)
    assert sum(encoded) <= SETTINGS.round_n + 64  # of the last round alone
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())


def test_recipe_runs_its_smoke_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", -1.0)
    config = Path(train_gate_recipe.__file__).parent / "configs" / "smoke" / "train_gate.yaml"
    record = train_gate_recipe.main(Recipe.from_cli(["--config", str(config), "--out", str(tmp_path)]))
    written = read_json(tmp_path / "gate.json")
    assert written["mean_auroc"] == record["mean_auroc"]
    assert set(written["rows"]) == {"train", "validation", "calibration", "unseen"}
    assert load_gate(tmp_path / "gate.safetensors").config.threshold == record["thresholds"]["gating"]
    text = (tmp_path / "log.txt").read_text()
    assert re.search(r"training the gate, .+: image \d+ of \d+, about \d+ (s|min) left", text), text
    assert "mean AUROC" in text


@pytest.mark.parametrize("given", [{}, {"model": "embedded", "benign": "open_clip:embedded"}, {"benign": "x"}])
def test_recipe_refuses_a_model_beside_encoders_and_neither(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a model, or a benign encoder and robust ones"):
        Recipe(out="x", **given)


def test_public_encoder_may_be_another_than_the_benign_one(photos: dict[str, LabelledImages]) -> None:
    more = {"rounds": 1, "per_image": ("pgd:margin",), "per_image_n": 32, "round_n": 32}
    gate, record = trained(photos, settings=more, public=tiny_encoder(1), directions=torch.randn(5, 32))
    assert 0 <= record["clean_weight"] <= 1
    assert gate.config.seen_attacks[-2:] == ("pgd", "gate_aware")


def test_cosine_gate_is_calibrated_without_training(photos: dict[str, LabelledImages]) -> None:
    gate, record = trained(photos, settings={"kind": "cosine", "per_image_n": 0, "stopped_n": 0})
    assert gate.config.kind == "cosine"
    assert not list(gate.parameters())
    assert 0 < gate.config.calibrated_threshold < 2
    assert record["attacks"]["universal: feature_uap"]["auroc"] > 0.6


def test_gate_file_round_trip(whole: tuple[FeatureGate, dict[str, Any]], tmp_path: Path) -> None:
    write_gate(tmp_path / "gate.safetensors", whole[0])
    assert same(load_gate(tmp_path / "gate.safetensors"), whole[0])
    assert read_tensors(tmp_path / "gate.safetensors")[1]["format"] == "zepad-mm gate 1"


def test_gate_aware_attack_keeps_the_score_lower(
    whole: tuple[FeatureGate, dict[str, Any]], photos: dict[str, LabelledImages]
) -> None:
    gate, (benign, robust) = whole[0], encoders()
    images = photos["train"].images[:32]

    def scored(images: Tensor) -> Tensor:
        features = benign(images)
        return torch.cat([features, gate(features, [robust(images)])[:, None]], 1)

    def attacked(weight: float, labels: Tensor | None = None) -> Tensor:
        attack = GateAwarePGD(epsilon=8 / 255, steps=8, gate_weight=weight)
        with torch.no_grad():
            adversarial = attack(scored, images, labels)
            assert float((adversarial - images).abs().max()) <= 8 / 255 + 1e-6
            return scored(adversarial)[:, -1]

    assert float(attacked(5.0).mean()) < float(attacked(0.0).mean()) - 0.1
    labels = torch.zeros(32, dtype=torch.long)
    assert float(attacked(50.0, labels).mean()) < float(attacked(0.0, labels).mean())


@pytest.mark.parametrize("name", ["crop_flip", "downscale"])
def test_changes_of_scale_stay_in_range_and_follow_the_generator(name: str, photos: dict[str, LabelledImages]) -> None:
    images = photos["train"].images[:4]
    done = [corruption(name)(images, 5, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*done)
    assert done[0].shape == images.shape
    assert 0 <= float(done[0].min()) <= float(done[0].max()) <= 1
    assert not torch.equal(done[0], images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"universal": ("feature_uapp",)}, "did you mean 'feature_uap'"),
        ({"held_out": "feature_uap"}, "held_out: 'feature_uap' is one of universal"),
        ({"per_image": ("pgd",)}, "per_image: expected ATTACK:LOSS with a loss of"),
        ({"round_budgets": (8.0, 12.0)}, "write 8/255, not 8"),
        ({"gating_rate": 0.0}, "gating_rate: expected a share above 0"),
        ({"worst_gating_rate": 0.5}, "worst_gating_rate: expected a share above 0 and below 0.5"),
        ({"corruptions": ("jpg",)}, "unknown corruption 'jpg'"),
    ],
)
def test_settings_refuse_what_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **settings)


def test_errors_name_what_is_wrong_with_the_images(photos: dict[str, LabelledImages]) -> None:
    benign, robust = encoders()
    with pytest.raises(ValueError, match="robust: expected at least one robust encoder"):
        train_gate(benign, [], photos["train"])
    with pytest.raises(ValueError, match="expected at least 32 to train a gate and to calibrate it, got 8"):
        train_gate(benign, [robust], photos["train"].images[:8])
    with pytest.raises(ValueError, match="one size for all sources"):
        train_gate(benign, [robust], {"a": photos["train"].images, "b": torch.rand(40, 3, 16, 16)})
