"""What a tuning leaves on disk and says of itself, and students with unusual tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.models import write_clip
from tests.training.test_fit import colours, run, tiny_encoder, tiny_student
from zepad_mm.encoders import load_encoder
from zepad_mm.models.branch import BranchConfig
from zepad_mm.models.card import describe_model, weakness_warning
from zepad_mm.models.config import MeasuredEffect
from zepad_mm.models.zepad import DetectorConfig, ZePADConfig
from zepad_mm.training import load_tuned, make_accelerator, validate, write_tuned
from zepad_mm.training.student import freeze_unused


@pytest.mark.parametrize(
    "wrap", [lambda module: torch.compile(module, backend="eager"), nn.DataParallel], ids=["compile", "parallel"]
)
@pytest.mark.parametrize("part", ["backbone", "layer"])
def test_write_tuned_gives_wrapped_modules_their_plain_names(
    wrap: Callable[[nn.Module], nn.Module], part: str, tmp_path: Path
) -> None:
    encoder = load_encoder(write_clip(tmp_path))
    owner, name = (encoder, "backbone") if part == "backbone" else (encoder.backbone, "transformer")
    wrapped = wrap(getattr(owner, name))
    setattr(owner, name, wrapped)
    write_tuned(tmp_path / "tuned", encoder, {})
    assert getattr(owner, name) is wrapped
    assert load_tuned(tmp_path / "tuned").state_dict().keys() == load_encoder(encoder.source).state_dict().keys()


@pytest.mark.parametrize(
    "wrong", [{"threshold": "0.3"}, {"threshold": math.nan}, {"threshold": True}, {"threshold": [0.1]}]
)
def test_detector_refuses_what_is_no_threshold(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="threshold wants"):
        DetectorConfig(**wrong)
    with pytest.raises(ValueError, match="false_positive_rate: expected a share"):
        DetectorConfig(false_positive_rate=5.0)


def test_configs_hold_numbers_of_numpy_as_plain_ones() -> None:
    detector = DetectorConfig(threshold=np.float32(0.5))  # type: ignore[arg-type]
    assert type(detector.threshold) is float
    branch = BranchConfig(name="a", role="robust", source="open_clip:embedded")
    params = {"k": np.int64(3), "list": [torch.tensor(1.5)]}
    config = ZePADConfig(public_source="x:y", branches=(branch,), class_names=("a",), fusion_params=params)
    assert config.fusion_params == {"k": 3, "list": [1.5]}
    assert type(config.fusion_params["k"]) is int
    with pytest.raises(ValueError, match=r"DetectorConfig.threshold: expected a plain value, got a ndarray of shape"):
        DetectorConfig(threshold=np.zeros(2))  # type: ignore[arg-type]


@pytest.mark.parametrize(("tuned", "nothing"), [((False, False), True), ((True, False), False)])
def test_a_model_says_which_branches_are_untuned(tuned: tuple[bool, ...], nothing: bool) -> None:
    branches = tuple(
        BranchConfig(name=f"r{number}", role="robust", source="open_clip:embedded", untuned=not done)
        for number, done in enumerate(tuned)
    )
    config = ZePADConfig(public_source="open_clip:embedded", branches=branches, class_names=("a",))
    assert config.nothing_tuned == nothing
    assert ("NOTHING WAS TUNED" in weakness_warning(config)) == nothing
    assert weakness_warning(config)  # the exit code is 3 for one untuned branch as for all
    assert "Untuned: " in describe_model(config)


@pytest.mark.parametrize(("defended", "weak"), [(0.44, True), (0.46, False)])
def test_a_model_says_that_its_defence_has_no_effect(defended: float, weak: bool) -> None:
    branch = BranchConfig(name="r", role="robust", source="open_clip:embedded")
    effect = MeasuredEffect(undefended=0.4, defended=defended, n=50, epsilon=10 / 255)
    config = ZePADConfig(public_source="open_clip:embedded", branches=(branch,), class_names=("a",), effect=effect)
    assert ("has no effect" in weakness_warning(config)) == ("has no effect" in describe_model(config)) == weak
    assert f"universal perturbation at 10/255: {100 * defended:.1f} % right with the defence" in describe_model(config)
    assert ZePADConfig.from_dict(config.to_dict()).effect == effect


@dataclass
class Idle:
    """The place of a process that gets no image: the sixth of eight for two images."""

    process_index: int = 5
    num_processes: int = 8

    def reduce(self, counts: torch.Tensor, reduction: str) -> torch.Tensor:
        assert counts.tolist() == [0, 0]
        return counts + 1


def test_validate_runs_nothing_for_an_empty_share() -> None:
    student = tiny_student()
    student.encoder.forward = None  # type: ignore[assignment]
    result = validate(student, colours(2), Idle(), epsilon=0.1)  # type: ignore[arg-type]
    assert (result.clean, result.n) == (0.5, 2)


def test_freeze_unused_freezes_only_what_features_do_not_depend_on() -> None:
    encoder = tiny_encoder()
    encoder.backbone.register_parameter("mask_token", nn.Parameter(torch.zeros(3)))
    encoder.requires_grad_(True)
    freeze_unused(encoder)
    assert [name for name, value in encoder.named_parameters() if not value.requires_grad] == ["backbone.mask_token"]
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_fit_takes_a_student_made_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        student = tiny_student()
        _, result = run(tmp_path, student=student)
    assert result.steps == 9


@pytest.mark.parametrize(("given", "expected"), [(None, "bf16"), ("no", "no")])
def test_make_accelerator_follows_the_launcher(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        assert make_accelerator(mixed_precision=given).mixed_precision == expected
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
        with pytest.raises(ValueError, match="mixed_precision"):
            make_accelerator()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
