"""The entries of transformers: its auto classes and its pipeline load a defended model and answer as the classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, pipeline

from tests.helpers import encoder_zoo as zoo
from tests.helpers.hub_server import reached_through, running_hub
from tests.helpers.models import make_gated_zepad, make_zepad
from zepad_mm import RobustZeroShotClassifier, ZePAD, load_encoder
from zepad_mm.pipelines import TASK, PretrainedZePAD, PretrainedZePADConfig
from zepad_mm.utils.io import ASSETS

LABELS = ["cat", "dog", "a red car"]
PHOTOS = sorted(map(str, (ASSETS / "photos").glob("*.jpg")))


@pytest.fixture
def folder(clip_source: str, tmp_path: Path) -> Path:
    make_gated_zepad(clip_source).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Photos(Dataset):
    """A data set of torch."""

    def __len__(self) -> int:
        return len(PHOTOS)

    def __getitem__(self, index: int) -> str:
        return PHOTOS[index]


def test_pipeline_answers_as_the_classifier(folder: Path, images: torch.Tensor) -> None:
    pipe = pipeline(TASK, model=str(folder), device="cpu")
    classify = RobustZeroShotClassifier.from_pretrained(folder)
    assert pipe(PHOTOS[0], candidate_labels=LABELS) == classify(PHOTOS[0], LABELS)
    assert pipe(images[0], LABELS) == classify(images[0], LABELS)
    answers = pipe(PHOTOS, candidate_labels=LABELS, batch_size=32)
    assert answers == classify(PHOTOS, LABELS)
    assert all(scores == sorted(scores, reverse=True) for scores in ([x["score"] for x in one] for one in answers))
    for stream in (Photos(), (photo for photo in PHOTOS)):
        assert list(pipe(stream, LABELS, batch_size=32)) == answers
    one_by_one = [classify(photo, LABELS) for photo in PHOTOS]
    assert pipe(PHOTOS, LABELS) == one_by_one


def test_pipeline_takes_the_arguments_of_the_classifier(folder: Path) -> None:
    given: dict[str, Any] = {"hypothesis_template": "{}", "policy": "white_box", "return_evidence": True, "top_k": 2}
    classify = RobustZeroShotClassifier.from_pretrained(folder)
    expected = classify(PHOTOS[0], LABELS, **given)
    assert pipeline(TASK, model=str(folder), device="cpu")(PHOTOS[0], LABELS, **given) == expected
    built = pipeline(TASK, model=classify.model, device="cpu", candidate_labels=LABELS, **given)
    assert built(PHOTOS[0]) == expected
    assert built(PHOTOS[0], ["x", "y"]) == classify(PHOTOS[0], ["x", "y"], **given)
    half = pipeline(TASK, model=str(folder), device="cpu", dtype=torch.bfloat16)
    exact = RobustZeroShotClassifier.from_pretrained(folder, dtype=torch.bfloat16)
    assert half(PHOTOS[0], LABELS) == exact(PHOTOS[0], LABELS)


def test_pipeline_defaults_to_the_embedded_model() -> None:
    labels = ["a cat", "a dog", "a cup of coffee", "a rocket"]
    expected = RobustZeroShotClassifier.from_pretrained("embedded")(PHOTOS[0], labels)
    assert expected[0]["label"] == "a cat"
    assert pipeline(TASK, device="cpu")(PHOTOS[0], candidate_labels=labels) == expected
    for model in (ZePAD.from_pretrained("embedded"), PretrainedZePAD.from_pretrained("embedded")):
        assert pipeline(TASK, model=model, device="cpu")(PHOTOS[0], labels) == expected


def test_auto_classes_load_a_defended_model(folder: Path, images: torch.Tensor, tmp_path: Path) -> None:
    zepad = ZePAD.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, PretrainedZePADConfig)
    assert config.zepad is not None
    assert config.zepad.to_dict() == json.loads((folder / "config.json").read_text()) | config.zepad.to_dict()
    assert config.id2label == dict(enumerate(zepad.class_names))
    model = AutoModel.from_pretrained(folder)
    assert isinstance(model, PretrainedZePAD)
    attacked = images.clone().requires_grad_()
    logits = model(attacked).logits
    torch.testing.assert_close(logits, zepad(images))
    assert torch.autograd.grad(logits.sum(), attacked)[0].abs().sum() > 0
    for number, saved in enumerate((model, pipeline(TASK, model=model, device="cpu"))):
        saved.save_pretrained(tmp_path / str(number))
        torch.testing.assert_close(ZePAD.from_pretrained(tmp_path / str(number))(images), zepad(images))
        assert {path.suffix for path in (tmp_path / str(number)).rglob("*") if path.is_file()} <= {
            ".json",
            ".md",
            ".safetensors",
        }


def test_auto_classes_and_pipeline_read_the_hub(clip_source: str, images: torch.Tensor, tmp_path: Path) -> None:
    with running_hub() as hub, reached_through(hub, tmp_path / "cache"):
        hub.tokens = {"hf_Owner": "acme"}
        hub.put("acme/tiny-clip", Path(clip_source.rpartition(":")[2]))
        model = make_zepad("open_clip:hf-hub:acme/tiny-clip")
        PretrainedZePAD.around(model).push_to_hub("acme/defended", token="hf_Owner")
        loaded = AutoModel.from_pretrained("acme/defended")
        torch.testing.assert_close(loaded(images).logits, model(images))
        pipe = pipeline(TASK, model="acme/defended", device="cpu", revision="main")
        classify = RobustZeroShotClassifier.from_pretrained("acme/defended")
        assert pipe(PHOTOS[0], LABELS) == classify(PHOTOS[0], LABELS)


def test_siglip_scores_are_those_of_its_sigmoid(tmp_path: Path, images: torch.Tensor) -> None:
    """Of a fused model too: labels in the order of the fused logits, and the branches' own sigmoid where they agree."""
    model = make_zepad(zoo.ZOO["hf: SigLIP"](tmp_path / "clip").source)
    pipe = pipeline(TASK, model=model, device="cpu")
    classify = RobustZeroShotClassifier(model)
    answer = pipe(images[0], LABELS)
    assert answer == classify(images[0], LABELS)
    task = classify.task(LABELS)
    order = task.defended(images[:1])[0].argsort(descending=True).tolist()
    assert [entry["label"] for entry in answer] == [LABELS[index] for index in order]
    assert sum(entry["score"] for entry in answer) != pytest.approx(1, abs=1e-3)
    assert task.logit_bias == model.text.logit_bias
    logits = torch.randn(1, 4, 3).expand(3, 4, 3)
    expected = (logits[0] + task.logit_bias).sigmoid()
    torch.testing.assert_close(task.fused_scores(task.fuse(logits), logits), expected)


def test_pipeline_names_the_fault(folder: Path, tmp_path: Path) -> None:
    pipe = pipeline(TASK, model=str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"candidate_labels: expected at least one label"):
        pipe(PHOTOS[0])
    with pytest.raises(ValueError, match=r"timeout: expected one of candidate_labels, hypothesis_template"):
        pipe(PHOTOS[0], LABELS, timeout=3)
    with pytest.raises(ValueError, match="num_workers: images are read in this process, got 2"):
        pipe(PHOTOS, LABELS, num_workers=2)
    with pytest.raises(ValueError, match="device_map: expected one of dtype, cache_dir"):
        AutoModel.from_pretrained(folder, device_map="auto")
    with pytest.raises(ValueError, match="not built from a configuration alone"):
        AutoModel.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(ValueError, match="expected a defended model of zepad-mm, got a Linear"):
        pipeline(TASK, model=torch.nn.Linear(1, 1), device="cpu")
    with pytest.raises(ValueError, match=r"config.json is of a defended model, expected one of an encoder"):
        load_encoder(f"hf:local-dir:{folder}")
