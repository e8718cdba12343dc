"""Unattacked images: every registered corruption and out-of-distribution image, and what detectors flag."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zepad_mm.data import LabelledImages
from zepad_mm.data.corruptions import CORRUPTIONS, OUT_OF_DISTRIBUTION, SEVERITIES, corrupt
from zepad_mm.evaluation import PRESETS, EvalData, EvalSettings, Report, evaluate
from zepad_mm.evaluation.metrics import wilson
from zepad_mm.models.detection import SCORES, score_names, threshold_at
from zepad_mm.models.zepad import ZePAD

SETTINGS = EvalSettings(
    threats=("clean",),
    diagnostics_n=0,
    rules=("equal",),
    corruptions=("jpeg", "contrast"),
    severities=(1, 5),
    out_of_distribution=("uniform_noise",),
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Smooth images with an edge, and some that are black, white and grey."""
    coarse = torch.rand(6, 3, 6, 6, generator=seeded(1))
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")
    smooth[:, :, :, 20:] *= 0.5
    flat = torch.tensor([0.0, 1.0, 0.5])[:, None, None, None].expand(3, 3, 32, 32)
    return torch.cat([smooth, flat])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_deterministic_in_range_and_grows_with_severity(name: str, photos: Tensor) -> None:
    before = photos.clone()
    distances = []
    for severity in SEVERITIES:
        changed = corrupt(photos, name, severity, seeded())
        assert changed.shape == photos.shape
        assert changed.dtype == photos.dtype
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
        assert torch.equal(changed, corrupt(photos, name, severity, seeded()))
        distances.append(float((changed - photos)[:6].square().mean().sqrt()))
    assert torch.equal(photos, before)
    assert distances[0] > 1e-3
    assert distances == sorted(set(distances))  # each severity changes the image more
    assert corrupt(photos[:0], name, 3, seeded()).shape == (0, 3, 32, 32)
    assert corrupt(photos[:1, :, :5, :3], name, 5, seeded()).shape == (1, 3, 5, 3)


def test_only_gaussian_noise_depends_on_the_generator(photos: Tensor) -> None:
    drawing = {name for name in CORRUPTIONS if not torch.equal(*(corrupt(photos, name, 3, seeded(s)) for s in (0, 1)))}
    assert drawing == {"gaussian_noise"}


def test_corruptions_have_the_properties_of_their_names(photos: Tensor) -> None:
    grey = torch.full((4, 3, 32, 32), 0.5)
    assert float(corrupt(grey, "gaussian_noise", 1, seeded()).std()) == pytest.approx(0.04, rel=0.05)
    for name in ("gaussian_blur", "contrast", "jpeg"):
        assert torch.allclose(corrupt(grey, name, 5, seeded()), grey, atol=1 / 255)
    assert torch.allclose(corrupt(grey, "brightness", 2, seeded()), torch.tensor(0.7))
    assert torch.allclose(corrupt(0 * grey, "brightness", 2, seeded()), torch.tensor(0.2))  # black has no hue: grey
    dim = photos[:6] * 0.4
    bright = corrupt(dim, "brightness", 2, seeded())
    assert torch.allclose(bright / bright.amax(1, keepdim=True), dim / dim.amax(1, keepdim=True), atol=1e-5)
    faded = corrupt(photos, "contrast", 5, seeded())
    assert torch.allclose(faded.mean((2, 3)), photos.mean((2, 3)), atol=1e-5)
    assert torch.allclose(faded.std((2, 3)), 0.05 * photos.std((2, 3)), atol=1e-5)


@pytest.mark.parametrize("name", OUT_OF_DISTRIBUTION)
def test_out_of_distribution_images_are_deterministic_and_in_range(name: str, photos: Tensor) -> None:
    make = OUT_OF_DISTRIBUTION.get(name)
    image_batch = make(photos, seeded())
    assert image_batch.shape == photos.shape
    assert 0 <= float(image_batch.min()) <= float(image_batch.max()) <= 1
    assert torch.equal(image_batch, make(photos, seeded()))
    assert not torch.equal(image_batch, make(photos, seeded(1)))
    assert make(photos[..., :31], seeded()).shape == (9, 3, 32, 31)


def test_phase_scrambling_keeps_the_spectrum_and_loses_the_shapes(photos: Tensor) -> None:
    faint = 0.5 + 0.1 * (photos[:6] - 0.5)  # so faint that nothing is clipped
    scramble = OUT_OF_DISTRIBUTION.get("phase_scrambled")
    centred = faint - faint.mean((2, 3), keepdim=True)
    likeness = []
    for seed in range(50):
        scrambled = scramble(faint, seeded(seed))
        assert torch.allclose(torch.fft.rfft2(scrambled).abs(), torch.fft.rfft2(faint).abs(), atol=1e-3)
        assert torch.allclose(scrambled.mean((2, 3)), faint.mean((2, 3)), atol=1e-5)
        likeness.append(float((scrambled * centred).sum() / centred.square().sum()))
    assert abs(sum(likeness) / 50) < 0.1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"corruptions": ("jpg",)}, "unknown corruption 'jpg'; did you mean 'jpeg'"),
        ({"out_of_distribution": ("noise",)}, "unknown kind of out-of-distribution image 'noise'"),
        ({"severities": (0,)}, r"severities: expected whole numbers from 1 \(slight\) to 5 \(heavy\), got 0"),
        ({"severities": (True,)}, "got True"),
        ({"corruptions": ("jpeg",), "severities": ()}, "severities: expected at least one"),
    ],
)
def test_settings_reject_unknown_corruptions_and_severities(
    bad: dict[str, object], message: str, photos: Tensor
) -> None:
    with pytest.raises(ValueError, match=message):
        EvalSettings(**bad)
    with pytest.raises(ValueError, match="write images / 255"):
        corrupt(255 * photos, "jpeg", 1, seeded())


def test_presets_name_none_one_and_all_corruptions() -> None:
    assert PRESETS.get("demo").corruptions == PRESETS.get("demo").out_of_distribution == ()
    assert len(PRESETS.get("smoke").corruptions) == len(PRESETS.get("smoke").severities) == 1
    assert set(PRESETS.get("full").corruptions) == set(CORRUPTIONS)
    assert set(PRESETS.get("full").out_of_distribution) == set(OUT_OF_DISTRIBUTION)
    assert PRESETS.get("full").severities == SEVERITIES


def test_false_alarms_match_the_scores_of_the_model(
    zepad: ZePAD, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = seeded(5)

    def labelled(n: int) -> LabelledImages:
        labels = torch.randint(3, (n,), generator=generator)
        return LabelledImages(torch.rand(n, 3, 32, 32, generator=generator), labels, zepad.class_names, "noise")

    data = EvalData(labelled(30), labelled(40), labelled(5))
    report = evaluate(zepad, data=data, settings=SETTINGS, out=tmp_path)
    rows = report.meta["false_alarms"]
    assert Report.load(tmp_path).meta["false_alarms"] == rows
    conditions = list(dict.fromkeys((row["kind"], row["name"], row["severity"]) for row in rows))
    assert conditions == [
        ("clean", "none", None),
        *(("corruption", name, severity) for name in ("jpeg", "contrast") for severity in (1, 5)),
        ("out_of_distribution", "uniform_noise", None),
    ]
    assert len(rows) == len(conditions) * len(score_names(gated=False))
    zepad.eval()
    with torch.no_grad():
        clean = zepad.branch_logits(data.validation.images)
        contrast = zepad.branch_logits(corrupt(data.test.images, "contrast", 5, seeded()))  # draws nothing
    for row in rows:
        assert row["n"] == 30
        assert (row["accuracy"] is None) == (row["kind"] == "out_of_distribution")
        assert row["flagged_at_fpr1"] <= row["flagged_at_fpr5"]
        assert row["flagged_at_fpr5_ci"] == list(wilson(round(30 * row["flagged_at_fpr5"]), 30))
        if (row["name"], row["severity"]) == ("contrast", 5):
            score = SCORES.get(row["score"])
            threshold = threshold_at(score(clean, zepad.benign), 0.05)
            flagged = score(contrast, zepad.benign) > threshold
            assert row["flagged_at_fpr5"] == pytest.approx(float(flagged.float().mean()), abs=1 / 30)
            right = zepad.fusion(contrast).logits.argmax(-1) == data.test.labels
            assert row["accuracy"] == pytest.approx(float(right.float().mean()), abs=1 / 30)
    text = (tmp_path / "report.md").read_text()
    assert "## False alarms" in text
    assert "| `contrast` 5 " in text
    stages = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert {"corruption_jpeg_1.safetensors", "out_of_distribution_uniform_noise.safetensors"} <= set(stages)
    (tmp_path / "cache" / "corruption_jpeg_5.safetensors").unlink()
    again = evaluate(zepad, data=data, settings=SETTINGS, out=tmp_path, resume=True)
    assert json.dumps(again.meta["false_alarms"]) == json.dumps(rows)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert {name for name in stages if kept[name] != stages[name]} == {"corruption_jpeg_5.safetensors"}
    none = evaluate(zepad, data=data, settings=replace(SETTINGS, corruptions=(), out_of_distribution=()))
    assert none.meta["false_alarms"] == []
    assert "False alarms" not in none.markdown()
