"""The zero-shot API mirrors transformers' pipeline and adds the evidence."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.model import ZePAD

LABELS = ["cat", "dog", "a red car"]


@pytest.fixture
def classifier(zepad: ZePAD) -> RobustZeroShotClassifier:
    return RobustZeroShotClassifier(zepad, batch_size=2)


def test_the_shape_of_the_pipeline(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    one = classifier(images[0], LABELS, hypothesis_template="This is a photo of {}.")
    assert [set(answer) for answer in one] == [{"score", "label"}] * 3
    assert [answer["score"] for answer in one] == sorted((answer["score"] for answer in one), reverse=True)
    assert sum(answer["score"] for answer in one) == pytest.approx(1, abs=1e-5)
    many = classifier(images, LABELS)
    assert len(many) == 4
    assert len(classifier(images, LABELS, top_k=1)[0]) == 1
    assert classifier([], LABELS) == []


def test_every_form_of_a_picture_gives_the_same_answer(
    classifier: RobustZeroShotClassifier, images: torch.Tensor, tmp_path: Path
) -> None:
    picture = to_pil_image((images[0] * 255).round().byte())
    path = tmp_path / "picture.png"
    picture.save(path)
    pixels = torch.from_numpy(__import__("numpy").array(picture)).permute(2, 0, 1).float() / 255
    forms = [picture, str(path), path, path.read_bytes(), pixels]
    answers = [classifier(form, LABELS) for form in forms]
    assert all(answer == answers[0] for answer in answers)


def test_neighbours_do_not_matter(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    """Also not when a neighbour has another size."""
    large = torch.rand(3, 70, 40, generator=torch.Generator().manual_seed(0))
    mixed = classifier([images[0], large, images[1], images[2]], LABELS)
    for answer, image in zip(mixed, (images[0], large, images[1], images[2]), strict=True):
        alone = classifier(image, LABELS)
        assert [entry["label"] for entry in alone] == [entry["label"] for entry in answer]
        assert alone[0]["score"] == pytest.approx(answer[0]["score"], abs=1e-5)


def test_evidence(classifier: RobustZeroShotClassifier, images: torch.Tensor) -> None:
    result = classifier(images[0], LABELS, return_evidence=True)
    evidence = result["evidence"]
    assert result["labels"] == classifier(images[0], LABELS)
    assert set(evidence["confidences"]) == set(evidence["weights"]) == {"full", "lora", "benign"}
    assert sum(evidence["weights"].values()) == pytest.approx(1, abs=1e-5)
    assert isinstance(evidence["flagged"], bool)
    assert len(evidence["undefended"]) == 3


def test_errors(classifier: RobustZeroShotClassifier, images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="candidate_labels: the list is empty"):
        classifier(images, [])
    with pytest.raises(ValueError, match=r"write \['cat'\]"):
        classifier(images, "cat")
    with pytest.raises(ValueError, match="exactly one"):
        classifier(images, LABELS, hypothesis_template="a photo of {} and {}")
    with pytest.raises(ValueError, match="unknown prompt set"):
        classifier(images, LABELS, hypothesis_template="fotos")
    with pytest.raises(ValueError, match="write images / 255"):
        classifier(images * 255, LABELS)
    with pytest.raises(ValueError, match="top_k"):
        classifier(images, LABELS, top_k=0)
    broken = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(broken, "PNG")
    (tmp_path / "cut.png").write_bytes(broken.getvalue()[:40])
    for bad in (tmp_path / "cut.png", b"no picture", "/nowhere/at/all.png"):
        with pytest.raises(ValueError, match="could not be read as a picture"):
            classifier(bad, LABELS)
    with pytest.raises(ValueError, match="got dict"):
        classifier([{}], LABELS)
