"""From a public CLIP to a defended one: with ready robust weights, and tuned on the spot (two steps)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.models import write_clip
from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.defend import NAMES, DefendSettings, defend
from zepad_mm.encoders import LoraSettings
from zepad_mm.models.zepad import ZePAD
from zepad_mm.training import TrainSettings

SMALL = DefendSettings(
    defences=("tecoa",),
    defence_options={"tecoa": {"attack_steps": 1}},
    lora=LoraSettings(rank=2),
    selection_steps=1,
    detector_steps=2,
    train=TrainSettings(steps=2, batch_size=4, validation_attack_steps=1),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Class folders with a training split alone."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        for index in range(10):
            pixels = (torch.rand(32, 32, 3, generator=generator) * 255).byte().numpy()
            Image.fromarray(pixels).save(folder / "train" / name / f"{index}.png")
    return str(folder)


def test_ready_branches(
    clip_source: str, tmp_path: Path, images: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """Two lines: sources of robust weights, no pictures, nothing is tuned."""
    ready = write_clip(tmp_path, seed=5)
    classify = RobustZeroShotClassifier.defend(clip_source, robust=[ready])
    assert len(classify(images, ["cat", "dog"])) == 4
    assert "nothing will be flagged" in caplog.text
    model = classify.model
    assert model.class_names == NAMES
    assert [(b.name, b.role, b.adaptation) for b in model.config.branches] == [
        ("robust1", "robust", "none"),
        ("benign", "benign", "none"),
    ]
    evidence = classify(images[0], ["cat", "dog"], return_evidence=True)["evidence"]
    assert evidence["flagged"] is None
    with pytest.raises(ValueError, match="needs a threshold, and this model has none"):
        classify(images[0], ["cat", "dog"], on_adversarial="flag")


def test_the_rule_and_the_threshold_are_chosen_where_there_are_pictures(
    clip_source: str, pictures: str, tmp_path: Path
) -> None:
    (tmp_path / "clip").mkdir()
    ready = write_clip(tmp_path / "clip", seed=5)
    model = defend(
        clip_source, robust=[ready], data=pictures, out=tmp_path / "out", class_names=["a", "b", "c"], settings=SMALL
    )
    assert model.config.detector.threshold is not None
    assert model.class_names == ("a", "b", "c")
    assert ZePAD.from_pretrained(tmp_path / "out").config.fusion == model.config.fusion


def test_tuned_branches_and_taking_up_again(clip_source: str, pictures: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    classify = RobustZeroShotClassifier.defend(clip_source, data=pictures, out=out, settings=SMALL)
    branches = {branch.name: branch for branch in classify.model.config.branches}
    assert {name: branch.adaptation for name, branch in branches.items()} == {"tecoa": "lora", "benign": "lora"}
    assert branches["tecoa"].objective == "tecoa at 4/255"
    assert classify.model.class_names == ("cat", "dog")
    assert all((out / "tuned" / name / "tuned.json").is_file() for name in branches)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ZePAD.from_pretrained(out)(picture), classify.model(picture))
    before = (out / "tuned" / "tecoa" / "tuned.json").stat().st_mtime_ns
    defend(clip_source, data=pictures, out=out, settings=SMALL)
    assert (out / "tuned" / "tecoa" / "tuned.json").stat().st_mtime_ns == before
    other = replace(SMALL, epsilon=1 / 255)
    with pytest.raises(ValueError, match=r"epsilon.*tuned with other settings"):
        defend(clip_source, data=pictures, out=out, settings=other)


def test_errors(clip_source: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out='defended'"):
        defend(clip_source)
    with pytest.raises(ValueError, match=r"robust: expected a list"):
        defend(clip_source, robust=clip_source)
    with pytest.raises(ValueError, match="zero-shot heads need a CLIP"):
        defend("timm:resnet18", robust=[clip_source])
    with pytest.raises(ValueError, match="its text embeddings do not fit"):
        defend(clip_source, robust=["open_clip:embedded"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        defend(clip_source, data=str(tmp_path / "nowhere"), out=tmp_path)
    with pytest.raises(ValueError, match="did you mean 'tecoa'"):
        DefendSettings(defences=("tecao",))
    with pytest.raises(ValueError, match="unknown defence 'fair'"):
        DefendSettings(defence_options={"fair": {}})
