"""Cost estimates of tuning runs (--plan), on the embedded model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from recipes import tune
from zepad_mm.data import LabelledImages, load_data
from zepad_mm.defences import FARE, Clean, Student
from zepad_mm.encoders import add_lora, load_encoder
from zepad_mm.models.heads import LinearHead
from zepad_mm.training import CostEstimate, TrainSettings, encode_images, estimate_cost, fit
from zepad_mm.training.cost import count_flops

ROOT = Path(__file__).parents[2]
SETTINGS = TrainSettings(steps=4, batch_size=8, validation_every=4, validation_attack_steps=2)


def student(lora: bool = False) -> Student:
    encoder = load_encoder("open_clip:embedded", image_size=64).requires_grad_(not lora)
    if lora:
        add_lora(encoder)
    return Student(encoder, LinearHead(encoder.feature_dim, 10))


@pytest.fixture(scope="module")
def data() -> tuple[LabelledImages, LabelledImages]:
    return load_data("embedded", "train", 64, 32), load_data("embedded", "validation", 64, 16)


def test_cost_estimate_adds_up() -> None:
    estimate = CostEstimate(
        steps=100, batch_size=8, step_s=2.0, shared_s=40.0, alone_s=3.0, step_flops=1e9, flops=1e11, peak_mb=500.0,
        gradient_bytes=4_000_000,
    )  # fmt: skip
    assert estimate.wall_s() == 243.0
    assert estimate.wall_s(8) == 33.0
    assert estimate.sent_bytes(1) == 0
    assert estimate.sent_bytes(8) == 7_000_000
    text = str(estimate)
    assert "0:04:03" in text
    assert "500 MB" in text
    assert "7.00 MB" in text


def test_count_flops_includes_input_gradients() -> None:
    weight, x = torch.rand(16, 32), torch.rand(4, 16, requires_grad=True)
    assert count_flops(lambda: torch.autograd.grad((x @ weight).sum(), x)) == 2 * 2 * 4 * 16 * 32
    depthwise, images = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.rand(2, 8, 5, 5, requires_grad=True)
    assert count_flops(lambda: depthwise(images).sum().backward()) == 3 * 2 * images.numel() * 9


def test_estimate_cost_matches_the_run(data: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    defence, (train, validation) = FARE(attack_steps=2), data
    found = estimate_cost(student(lora=True), train, validation, defence, SETTINGS)
    tuned = student(lora=True)  # loading counts as work too, and is no part of the run
    began = time.perf_counter()
    taken = count_flops(lambda: fit(tuned, train, None, defence, SETTINGS, out=tmp_path))
    wall = time.perf_counter() - began
    assert found.steps == 4
    assert wall / 5 < found.wall_s() < 5 * wall  # benchmarks/cost.py checks it closely, on a quiet machine
    encoder = student(lora=True).encoder
    targets = count_flops(lambda: encode_images(encoder, train.images))
    assert found.step_flops * 4 + targets == pytest.approx(taken, rel=0.02)
    adapter = sum(p.numel() for p in student(lora=True).encoder.parameters() if p.requires_grad)
    assert found.gradient_bytes == 4 * adapter
    assert 100 < found.peak_mb < 100_000
    benign = estimate_cost(student(), train, None, Clean(), SETTINGS)
    assert benign.step_flops < found.step_flops
    assert benign.gradient_bytes > found.gradient_bytes


@pytest.mark.parametrize("defence", ["tecoa", "clean"])
def test_plan_option_prints_the_estimate_and_writes_nothing(
    defence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--data.n_train=64", "--data.n_validation=16", "--settings.steps=4", "--settings.batch_size=8"]
    config = str(ROOT / "recipes" / "configs" / "smoke" / "tune.yaml")
    chosen = ["--defence", defence, "--defence_options", "{}"]
    tune.main(tune.Recipe.from_cli(["--config", config, "--plan", *chosen, "--out", str(tmp_path / "out"), *small]))
    printed = capsys.readouterr().out
    assert "4 steps of 8 images" in printed
    assert "devices  wall time" in printed
    assert not (tmp_path / "out").exists()
