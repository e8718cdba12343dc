"""ZePAD: outputs, saving, strict loading and changes of classes, rule and detector."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.models import CLASSES, make_zepad, write_clip
from zepad_mm.attacks import PGD
from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.encoders import load_encoder
from zepad_mm.models.branch import BranchConfig
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.utils.io import read_tensors, write_tensors

ROOT = Path(__file__).parents[2]


def test_zepad_forward_fuses_branch_outputs(zepad: ZePAD, images: torch.Tensor) -> None:
    with torch.no_grad():
        outputs = zepad.branch_outputs(images)
        for branch, features, logits in zip(zepad.branches.values(), outputs.features, outputs.logits, strict=True):
            torch.testing.assert_close(branch.encoder(images), features)  # type: ignore[union-attr, operator]
            torch.testing.assert_close(branch(images), logits)
        torch.testing.assert_close(zepad(images), zepad.fuse(outputs.logits).logits)
    decision = zepad.decide(images)
    assert decision.logits.shape == (4, 3)
    assert decision.weights.shape == decision.confidences.shape == (3, 4)
    assert zepad.is_adversarial(decision).dtype == torch.bool


def test_zepad_attack_reaches_every_branch(zepad: ZePAD, images: torch.Tensor) -> None:
    """As in third-party attacks: gradients of the fused logits, through every branch."""
    x = images.clone().requires_grad_(True)
    logits = zepad.branch_logits(x)
    gradients = [torch.autograd.grad(zepad.branch(n)(x).sum(), x)[0].abs().sum() for n in zepad.branches]
    assert all(gradient > 0 for gradient in gradients)
    (through,) = torch.autograd.grad(zepad.fuse(logits).logits[:, 0].sum(), x)
    assert through.abs().sum() > 0
    labels = zepad.decide(images).logits.argmax(-1)
    attacked = PGD(epsilon=0.3, steps=20)(zepad, images, labels)
    assert (zepad.decide(attacked).logits.argmax(-1) != labels).float().mean() >= 0.75


def test_zepad_outputs_are_independent_of_the_batch(zepad: ZePAD, images: torch.Tensor) -> None:
    together = zepad.decide(images).logits
    alone = torch.cat([zepad.decide(image[None]).logits for image in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_save_pretrained_stores_only_trained_weights(
    zepad: ZePAD, images: torch.Tensor, tmp_path: Path, dtype: str
) -> None:
    from dataclasses import replace

    zepad.config = replace(zepad.config, storage_dtype=dtype)
    zepad.save_pretrained(tmp_path)
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    assert {key.split(".")[1] for key in tensors if ".encoder." in key} == {"full"}
    assert (tmp_path / "branches" / "lora" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "branches" / "benign").exists()
    loaded = ZePAD.from_pretrained(tmp_path)
    tolerance = 0 if dtype == "float32" else 0.05
    torch.testing.assert_close(
        loaded.decide(images).logits, zepad.decide(images).logits, atol=tolerance, rtol=tolerance / 10
    )
    assert loaded.config.class_names == CLASSES
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_save_pretrained_adapter_loads_with_peft_alone(zepad: ZePAD, images: torch.Tensor, tmp_path: Path) -> None:
    from peft import PeftModel

    from zepad_mm.encoders.attention import unfuse_attention

    zepad.save_pretrained(tmp_path)
    encoder = load_encoder(zepad.config.public_source)
    unfuse_attention(encoder.backbone)
    encoder.backbone = PeftModel.from_pretrained(encoder.backbone, str(tmp_path / "branches" / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), zepad.branch("lora").encoder(images))


def test_from_pretrained_names_wrong_weights(zepad: ZePAD, tmp_path: Path) -> None:
    zepad.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good_weights, good_config = weights.read_bytes(), config.read_text()

    def expect(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ZePAD.from_pretrained(tmp_path)
        weights.write_bytes(good_weights)
        config.write_text(good_config)

    tensors, _ = read_tensors(weights)
    key = "branches.full.encoder.backbone.conv1.weight"
    write_tensors(weights, {name: tensor for name, tensor in tensors.items() if name != key})
    expect("lacks branches.full.encoder.backbone.conv1.weight")
    write_tensors(weights, {**tensors, "branches.full.extra": torch.zeros(1)})
    expect("has the unknown branches.full.extra")
    write_tensors(weights, {**tensors, key: tensors[key][:1]})
    expect(r"has branches\.full\.encoder\.backbone\.conv1\.weight .* instead of")
    weights.write_bytes(good_weights[: len(good_weights) // 2])
    expect("not a complete safetensors file")
    config.write_text(good_config[:50])
    expect("not a complete JSON")
    config.write_text(json.dumps({**json.loads(good_config), "fusoin": "rfdm"}))
    expect("no key 'fusoin'; did you mean 'fusion'")
    config.write_text(json.dumps({**json.loads(good_config), "format": 99}))
    expect("upgrade")
    write_tensors(weights, {**tensors, key: tensors[key].flip(0)})
    expect("answers a fixed image differently")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ZePAD.from_pretrained(tmp_path / "branches")
    assert ZePAD.from_pretrained(tmp_path) is not None


def test_from_pretrained_detects_another_base(tmp_path: Path, images: torch.Tensor) -> None:
    (tmp_path / "clip").mkdir()
    source = write_clip(tmp_path / "clip", seed=0)
    make_zepad(source).save_pretrained(tmp_path / "model")
    ZePAD.from_pretrained(tmp_path / "model")
    write_clip(tmp_path / "clip", seed=1)
    with pytest.raises(ValueError, match="answers a fixed image differently"):
        ZePAD.from_pretrained(tmp_path / "model")


def test_save_pretrained_rewrites_its_own_card(zepad: ZePAD, tmp_path: Path) -> None:
    zepad.save_pretrained(tmp_path)
    zepad.set_fusion("rfdm", k=2.0).save_pretrained(tmp_path)
    assert "`rfdm` {'k': 2.0}" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    zepad.set_fusion("equal").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


def test_set_classes_needs_no_training(zepad: ZePAD, images: torch.Tensor) -> None:
    before = zepad.decide(images).logits
    zepad.set_classes(["cat", "dog", "bird", "fish"], "single")
    assert zepad.decide(images).logits.shape == (4, 4)
    assert zepad.undefended(images).shape == (4, 4)
    zepad.set_classes(CLASSES, "single")
    torch.testing.assert_close(zepad.decide(images).logits, before)
    with pytest.raises(ValueError, match="the list is empty"):
        zepad.set_classes([])
    with pytest.raises(ValueError, match="more than once"):
        zepad.set_classes(["cat", "cat"])
    with pytest.raises(ValueError, match=r"exactly one '\{\}'"):
        zepad.set_classes(["cat", "dog"], ["a photo"])


def test_set_classes_warns_about_untuned_classes(zepad: ZePAD) -> None:
    narrow = ZePAD(replace(zepad.config, tuned_names=("hat", "dress")), list(zepad.branches.values()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        narrow.set_classes(["Hat", "dress"])  # known, in another spelling
        zepad.set_classes(["cat", "dog"])  # tuned to keep any name
    with pytest.warns(UserWarning, match=r"2 classes and may have forgotten others: 'cat', 'dog', 'frog', \.\.\."):
        narrow.set_classes(["hat", "cat", "dog", "frog", "car"])
    with pytest.warns(UserWarning, match="have forgotten others: 'cat'"):
        RobustZeroShotClassifier(narrow).task(["cat", "hat"])


def test_set_fusion_changes_the_rule(zepad: ZePAD, images: torch.Tensor) -> None:
    zepad.set_fusion("rfdm", k=0.0)
    assert zepad.config.fusion_params == {"k": 0.0}
    assert ZePADConfig.from_dict(zepad.config.to_dict()) == zepad.config
    with pytest.raises(ValueError, match="no branch 'x'"):
        zepad.branch("x")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x * 255, "write images / 255"),
        (lambda x: (x - 0.5) / 0.25, "the encoder normalises inside"),
        (lambda x: x.masked_fill(x > 0.5, float("nan")), "NaN"),
        (lambda x: x[:, :1], "expand"),
        (lambda x: x[0], r"images\[None\]"),
        (lambda x: (x * 255).byte(), "floats"),
    ],
)
def test_zepad_errors_name_the_fix_for_bad_images(
    zepad: ZePAD, images: torch.Tensor, bad: object, message: str
) -> None:
    for call in (zepad, zepad.decide):
        with pytest.raises(ValueError, match=message):
            call(bad(images))  # type: ignore[operator]


def test_committed_model_beats_the_undefended_one_under_attack() -> None:
    """Both see images that were attacked on the public encoder in a few steps; full results are in the report."""
    from zepad_mm.attacks import PGD
    from zepad_mm.data import load_embedded

    model = ZePAD.from_pretrained("embedded").requires_grad_(False)
    images, labels = load_embedded("test", n=64)
    made = PGD(epsilon=4 / 255, loss="feature_l2", steps=4)(model.undefended.encoder, images)

    def accuracy(logits: torch.Tensor) -> float:
        return float((logits.argmax(-1) == labels).float().mean())

    with torch.no_grad():
        assert accuracy(model(images)) >= accuracy(model.undefended(images)) - 0.05
        assert accuracy(model(made)) >= accuracy(model.undefended(made)) + 0.1


def test_branch_config_names_the_roles_that_replace_old_ones() -> None:
    for role in ("mpae", "bmp"):
        with pytest.raises(ValueError, match=r"'robust', 'benign'.*change the role 'mpae' to 'robust' and 'bmp'"):
            BranchConfig(name="one", role=role, source="open_clip:embedded")


def test_a_model_in_half_precision_answers_and_says_that_it_is_saved_in_single(
    zepad: ZePAD, images: torch.Tensor, tmp_path: Path
) -> None:
    expected = zepad.decide(images).logits
    zepad.save_pretrained(tmp_path)
    half = zepad.to(torch.bfloat16)
    torch.testing.assert_close(half(images), expected, atol=0.2, rtol=0.1)
    assert half.decide(images).logits.dtype == torch.float32
    with pytest.raises(ValueError, match=r"weights in torch\.bfloat16; models are saved in float32"):
        half.save_pretrained(tmp_path)
    torch.testing.assert_close(ZePAD.from_pretrained(tmp_path).decide(images).logits, expected)
