"""defend(): a defended CLIP from published robust weights, and from branches tuned here in two steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers.models import write_clip
from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.cli import main
from zepad_mm.defend import NAMES, QUICK_GATE, DefendSettings, defend
from zepad_mm.encoders import LoraSettings
from zepad_mm.models.zepad import ZePAD
from zepad_mm.training import TrainSettings
from zepad_mm.utils.io import read_json

SMALL = DefendSettings(
    defences=("tecoa",),
    gate=None,
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


def write_photos(folder: Path, count: int) -> None:
    """Images without labels."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        pixels = (torch.rand(8, 8, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(pixels).resize((32, 32)).save(folder / f"{index}.png")


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
    fare = {"attack_steps": 1, "rho": 0.1, "scale_free": True}
    settings = replace(SMALL, defences=("fare",), defence_options={"fare": fare})
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


def test_defend_trains_a_gate_around_published_weights(clip_source: str, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    write_photos(tmp_path / "photos", 96)
    settings = replace(SMALL, gate=replace(QUICK_GATE, universal_steps=3, steps=50))
    classify = RobustZeroShotClassifier.defend(
        clip_source,
        robust=[write_clip(tmp_path / "clip", seed=5)],
        data=str(tmp_path / "photos"),
        out=tmp_path / "out",
        settings=settings,
    )
    config = classify.model.config
    assert config.fusion == "gated"
    assert config.gate is not None
    assert config.gate.seen_attacks
    assert (config.policy, config.policy_caps["zero_sacrifice"]) == ("zero_sacrifice", 1.0)
    assert 0 <= config.policy_caps["white_box"] <= 1
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    loaded = ZePAD.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(image), classify.model(image))
    if config.detector.score == "feature_gate":
        record = read_json(tmp_path / "out" / "tuned" / "gate" / "gate.json")
        assert config.detector.threshold == record["thresholds"]["detection"]


def test_zepad_defend_takes_a_folder_of_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way on the embedded CLIP, at few pixels and steps: a robust branch, a gate, policies."""
    write_photos(tmp_path / "photos", 96)
    few = ["--steps", "2", "--batch-size", "8", "--n-validation", "16", "--quick", "--quiet", "--json"]
    words = ["defend", "open_clip:embedded?image_size=32", "--data", str(tmp_path / "photos"), *few]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [branch["name"] for branch in found["branches"]] == ["fare", "benign"]
    assert found["fusion"] == "gated"
    assert set(found["policy_caps"]) == {"zero_sacrifice", "white_box"}
    assert len(ZePAD.from_pretrained(tmp_path / "out").gate.config.seen_attacks) == 4


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
    write_photos(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="data: expected at least 2 images, and about 100 for a gate, got 1 in"):
        defend(clip_source, data=str(tmp_path / "one"), out=tmp_path / "out")
    with pytest.raises(ValueError, match="did you mean 'tecoa'"):
        DefendSettings(defences=("tecao",))
    with pytest.raises(ValueError, match="'clean' tunes benign branches"):
        DefendSettings(defences=("tecoa", "clean"))
    with pytest.raises(ValueError, match="unknown defence 'fair'"):
        DefendSettings(defence_options={"fair": {}})
