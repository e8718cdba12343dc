"""defend(): a defended CLIP from published robust weights, and from branches tuned here in two steps."""

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
    tune_benign=False,
    defence_options={"tecoa": {"attack_steps": 1}},
    lora=LoraSettings(rank=2),
    selection_steps=1,
    detector_steps=2,
    train=TrainSettings(steps=2, batch_size=4, validation_attack_steps=1),
)


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Class folders with a training split alone."""
    folder = tmp_path_factory.mktemp("image_folders")
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (folder / "train" / name).mkdir(parents=True)
        for index in range(10):
            pixels = (torch.rand(32, 32, 3, generator=generator) * 255).byte().numpy()
            Image.fromarray(pixels).save(folder / "train" / name / f"{index}.png")
    return str(folder)


def test_defend_takes_published_robust_weights(
    clip_source: str, tmp_path: Path, images: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """Without images nothing is tuned, and no threshold is chosen."""
    robust = write_clip(tmp_path, seed=5)
    classify = RobustZeroShotClassifier.defend(clip_source, robust=[robust])
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


def test_defend_selects_rule_and_threshold_on_images(clip_source: str, image_folders: str, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    robust = write_clip(tmp_path / "clip", seed=5)
    model = defend(
        clip_source,
        robust=[robust],
        data=image_folders,
        out=tmp_path / "out",
        class_names=["a", "b", "c"],
        settings=SMALL,
    )
    assert model.config.detector.threshold is not None
    assert model.class_names == ("a", "b", "c")
    assert ZePAD.from_pretrained(tmp_path / "out").config.fusion == model.config.fusion


def test_defend_tunes_branches_and_resumes(clip_source: str, image_folders: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = replace(SMALL, tune_benign=True)
    classify = RobustZeroShotClassifier.defend(clip_source, data=image_folders, out=out, settings=settings)
    branches = {branch.name: branch for branch in classify.model.config.branches}
    assert {name: branch.adaptation for name, branch in branches.items()} == {"tecoa": "lora", "benign": "lora"}
    # too few steps to beat the public weights, which the model says
    assert branches["tecoa"].objective == "untuned: tecoa at 4/255 kept the public weights"
    assert branches["tecoa"].untuned
    assert classify.model.config.nothing_tuned
    assert classify.model.config.detector.threshold is None
    assert "this model defends against nothing" in (out / "README.md").read_text()
    assert classify.model.class_names == ("cat", "dog")
    assert all((out / "tuned" / name / "tuned.json").is_file() for name in branches)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ZePAD.from_pretrained(out)(image), classify.model(image))
    before = (out / "tuned" / "tecoa" / "tuned.json").stat().st_mtime_ns
    defend(clip_source, data=image_folders, out=out, settings=settings)
    assert (out / "tuned" / "tecoa" / "tuned.json").stat().st_mtime_ns == before
    other = replace(settings, epsilon=1 / 255)
    with pytest.raises(ValueError, match=r"epsilon.*tuned with other settings"):
        defend(clip_source, data=image_folders, out=out, settings=other)


@pytest.mark.parametrize("nested", [False, True])
def test_defend_needs_no_labels(nested: bool, clip_source: str, image_folders: str, tmp_path: Path) -> None:
    """A folder of images, or class folders whose names are not read while the branch is tuned."""
    folder, out = tmp_path / "photos", tmp_path / "out"
    for path in sorted(Path(image_folders).rglob("*.png")):
        place = folder / (path.parent.name if nested else "") / f"{path.parent.name}-{path.name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    settings = replace(SMALL, defences=("fare",), defence_options={"fare": {"attack_steps": 1, "rho": 0.1}})
    model = defend(clip_source, data=str(folder), out=out, settings=settings)
    assert model.class_names == (("cat", "dog") if nested else NAMES)
    assert [(b.name, b.role, b.adaptation) for b in model.config.branches] == [
        ("fare", "robust", "lora"),
        ("benign", "benign", "none"),
    ]
    assert not model.config.nothing_tuned
    assert model.config.tuned_names == ()
    assert model.config.detector.threshold is not None
    if not nested:
        for needing in ({"defences": ("tecoa",)}, {"tune_benign": True}):
            with pytest.raises(ValueError, match=r"photos has no labels, which (tecoa|clean)"):
                defend(clip_source, data=str(folder), out=tmp_path / "other", settings=replace(settings, **needing))


def test_defend_rejects_impossible_input(clip_source: str, tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="'clean' tunes benign branches"):
        DefendSettings(defences=("tecoa", "clean"))
    with pytest.raises(ValueError, match="unknown defence 'fair'"):
        DefendSettings(defence_options={"fair": {}})
