"""tune(): the head that "auto" means, the files and the record, and what a folder that is tuned already does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers import encoder_zoo
from zepad_mm.data import LabelledImages
from zepad_mm.encoders import LoraSettings
from zepad_mm.training import TrainSettings, TuneSettings, load_tuned, make_student, tune

SETTINGS = TrainSettings(steps=2, batch_size=4, validation_attack_steps=1, validation_every=2)


def data(n: int = 8) -> LabelledImages:
    images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return LabelledImages(images, torch.arange(n) % 2, ("cat", "dog"), "random")


@pytest.mark.parametrize("defence", ["tecoa", "fare"])
def test_auto_head_is_zero_shot_for_every_kind_of_clip(defence: str, clip_source: str, tmp_path: Path) -> None:
    for source in (clip_source, encoder_zoo.ZOO["hf: CLIP"](tmp_path / "clip").source):
        student = make_student(TuneSettings(source=source, defence=defence), data())
        assert type(student.head).__name__ == "ZeroShotHead"


@pytest.mark.parametrize(("defence", "head", "trains"), [("tecoa", "MLPHead", True), ("fare", "LinearHead", False)])
def test_auto_head_without_a_text_tower(defence: str, head: str, trains: bool, timm_source: str) -> None:
    student = make_student(TuneSettings(source=timm_source, defence=defence), data())
    assert type(student.head).__name__ == head
    assert all(parameter.requires_grad == trains for parameter in student.head.parameters())


@pytest.mark.parametrize("adaptation", ["full", "lora"])
def test_tune_returns_what_it_writes(adaptation: str, clip_source: str, tmp_path: Path) -> None:
    tuning = TuneSettings(source=clip_source, adaptation=adaptation, lora=LoraSettings(rank=2), settings=SETTINGS)  # type: ignore[arg-type]
    tuned = tune(tuning, data(), data(4), out=tmp_path, extra={"note": "a test"})
    images = data(2).images
    with torch.no_grad():
        torch.testing.assert_close(load_tuned(tmp_path)(images), tuned.encoder(images))
    assert not any(parameter.requires_grad for parameter in tuned.encoder.parameters())
    assert tuned.record["role"] == "robust"
    assert (tuned.record["steps"], tuned.record["note"]) == (2, "a test")


def test_tune_loads_what_is_tuned_already_and_names_what_differs(clip_source: str, tmp_path: Path) -> None:
    tuning = TuneSettings(source=clip_source, defence="clean", settings=SETTINGS)
    first = tune(tuning, data(), data(4), out=tmp_path)
    assert first.record["role"] == "benign"
    written = (tmp_path / "tuned.json").stat().st_mtime_ns
    again = tune(replace(tuning, settings=replace(SETTINGS, log_every=1)), data(), data(4), out=tmp_path)
    assert (tmp_path / "tuned.json").stat().st_mtime_ns == written
    assert again.record["seconds"] == first.record["seconds"]
    other = replace(tuning, settings=replace(SETTINGS, lr_encoder=1e-3))
    with pytest.raises(ValueError, match=r"train\.lr_encoder = 0\.0001, now train\.lr_encoder = 0\.001"):
        tune(other, data(), data(4), out=tmp_path)
