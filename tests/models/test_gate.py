"""The feature gate by itself and inside a defended model; test_onnx.py exports and compiles one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import encoder_zoo as zoo
from tests.helpers.models import CLASSES, make_gated_zepad
from zepad_mm.attacks import PGD, FusedAttack
from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.encoders import load_encoder
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.gate import FeatureGate, GateConfig, gate_for
from zepad_mm.models.heads import HEADS
from zepad_mm.models.zepad import ZePAD, ZePADConfig
from zepad_mm.utils.io import read_tensors, write_tensors

WIDTHS: list[tuple[int, tuple[int, ...]]] = [(8, (8,)), (8, (8, 8)), (8, (12,)), (8, (8, 12, 4))]


def features(widths: Sequence[int], n: int = 5, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(n, width, generator=generator) for width in widths]


@pytest.mark.parametrize(("benign", "robust"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gate_is_float32_and_differentiable(benign: int, robust: tuple[int, ...], dtype: torch.dtype) -> None:
    gate = FeatureGate(benign, robust, GateConfig(hidden=16, threshold=0.0)).to(dtype).eval()
    given = [part.to(dtype).requires_grad_(True) for part in features((benign, *robust))]
    assert gate.inputs(given[0], given[1:]).shape == (5, gate.input_width)
    z = gate(given[0], given[1:])
    assert z.shape == (5,)
    assert z.dtype == torch.float32
    assert all(bool(g.abs().sum() > 0) for g in torch.autograd.grad(z.sum(), given))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gate(given[0], given[1:]), z)


@pytest.mark.parametrize("kind", ["learned", "cosine"])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_gate_is_finite_for_features_of_any_norm(kind: str, size: float) -> None:
    gate = FeatureGate(8, (8,), GateConfig(kind=kind)).eval()  # type: ignore[arg-type]
    a, b = (part.requires_grad_(True) for part in features((8, 8)))
    z = gate(size * a, [b])
    assert bool(torch.isfinite(z).all())
    assert all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(z.sum(), (a, b)))


def test_cosine_gate_is_the_mean_distance_and_has_no_weights() -> None:
    gate = FeatureGate(8, (8, 8), GateConfig(kind="cosine"))
    assert gate.state_dict() == {}
    a, b, c = features((8, 8, 8))
    similarity = torch.nn.functional.cosine_similarity
    expected = 1 - (similarity(a, b) + similarity(a, c)) / 2
    torch.testing.assert_close(gate(a, [b, c]), expected)
    torch.testing.assert_close(gate(a, [a, 2 * a]), torch.zeros(5), atol=1e-6, rtol=0)


def test_gate_weight_falls_with_the_logit_up_to_its_cap() -> None:
    gate = FeatureGate(8, (8,), GateConfig(threshold=1.0, sharpness=2.0, cap=0.6))
    weights = gate.weight(torch.tensor([-50.0, 0.0, 1.0, 2.0, 50.0]))
    assert (weights.diff() < 0).all()
    torch.testing.assert_close(weights[[0, 2, 4]], torch.tensor([0.6, 0.3, 0.0]))


def test_gate_learns_on_cached_inputs() -> None:
    """Clean: both encoders agree up to noise; attacked: the original moves."""
    gate = FeatureGate(8, (8,), GateConfig(hidden=32))
    a, b = features((8, 8), n=512)
    clean, attacked = gate.inputs(b + 0.3 * a, [b]), gate.inputs(b + 1.5 * a, [b])
    gate.fit_scale(torch.cat([clean, attacked]))
    optimizer = torch.optim.Adam(gate.parameters(), 3e-3)
    gate.train()
    for _ in range(150):
        z = gate.logit(torch.cat([clean[:384], attacked[:384]]))
        target = torch.cat([torch.zeros(384), torch.ones(384)])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate.eval()
    held_out = gate(b[384:] + 0.3 * a[384:], [b[384:]]), gate(b[384:] + 1.5 * a[384:], [b[384:]])
    assert float((held_out[1] > held_out[0]).float().mean()) > 0.9


def test_gate_errors_name_the_fix() -> None:
    with pytest.raises(ValueError, match=r"equal width, got 8 .* and 12 .*kind='learned'"):
        FeatureGate(8, (12,), GateConfig(kind="cosine"))
    with pytest.raises(ValueError, match="at least one robust branch"):
        FeatureGate(8, ())
    with pytest.raises(ValueError, match=r"widths \(8, 8\), the benign branch first, got \(8, 12\)"):
        FeatureGate(8, (8,))(torch.rand(1, 8), [torch.rand(1, 12)])
    with pytest.raises(ValueError, match=r"no threshold; calibrate it .* GateConfig\(threshold"):
        FeatureGate(8, (8,)).weight(torch.zeros(1))
    for values, message in (
        ({"hidden": 0}, "hidden: expected 1"),
        ({"dropout": 1.0}, "dropout: expected"),
        ({"sharpness": 0.0}, "sharpness: expected a positive"),
        ({"cap": 1.5}, "cap: expected a share"),
        ({"kind": "cosin"}, "did you mean 'cosine'"),
    ):
        with pytest.raises(ValueError, match=message):
            GateConfig.from_dict(values)


@pytest.fixture
def gated(clip_source: str) -> ZePAD:
    return make_gated_zepad(clip_source)


@pytest.mark.parametrize("kind", ["learned", "cosine"])
def test_gated_model_decides_by_its_gate(clip_source: str, images: torch.Tensor, kind: Any) -> None:
    model = make_gated_zepad(clip_source, kind)
    with torch.no_grad():
        outputs = model.branch_outputs(images)
    assert model.gate is not None
    assert outputs.gate is not None
    full, lora, benign = outputs.features
    torch.testing.assert_close(outputs.gate, model.gate(benign, [full, lora]))
    decision = model.decide(images)
    torch.testing.assert_close(decision.gate, outputs.gate)
    torch.testing.assert_close(decision.score, outputs.gate)
    torch.testing.assert_close(decision.weights[2], 0.9 * torch.sigmoid(-2 * outputs.gate))
    torch.testing.assert_close(model.fuse(model.branch_logits(images)).logits, decision.logits)
    assert model.is_adversarial(decision).equal(outputs.gate > 0)


def test_attacks_on_a_gated_model_go_through_the_gate(gated: ZePAD, images: torch.Tensor) -> None:
    x = images.clone().requires_grad_(True)
    outputs = gated.branch_outputs(x)
    assert outputs.gate is not None
    gradients = torch.autograd.grad(outputs.gate.sum(), outputs.features, retain_graph=True)
    assert all(bool(g.abs().sum() > 0) for g in gradients)
    through = torch.autograd.grad(gated.fuse(outputs).logits[:, 0].sum(), x, retain_graph=True)[0]
    detached = gated.fuse(replace(outputs, gate=outputs.gate.detach()))
    assert not torch.allclose(torch.autograd.grad(detached.logits[:, 0].sum(), x)[0], through)
    labels = gated.decide(images).logits.argmax(-1)
    for attacked in (
        PGD(epsilon=0.3, steps=20)(gated, images, labels),
        FusedAttack(fuse=gated.fuse, loss="weight_hijack", epsilon=0.3, steps=10)(gated.branch_logits, images, labels),
        FusedAttack(fuse=gated.fuse, loss="mora", epsilon=0.3, steps=10)(gated.branch_logits, images, labels),
    ):
        assert (gated.decide(attacked).logits.argmax(-1) != labels).float().mean() >= 0.5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gate_is_saved_and_loaded(gated: ZePAD, images: torch.Tensor, tmp_path: Path, dtype: str) -> None:
    gated.config = replace(gated.config, storage_dtype=dtype)
    gated.set_policy("white_box").save_pretrained(tmp_path)
    loaded = ZePAD.from_pretrained(tmp_path)
    assert loaded.config.gate == gated.config.gate
    assert loaded.config.policy == "white_box"
    assert not loaded.training
    tolerance = 0 if dtype == "float32" else 0.05
    for name in ("logits", "gate"):
        ours, theirs = getattr(gated.decide(images), name), getattr(loaded.decide(images), name)
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)
    assert "policy `white_box`" in (tmp_path / "README.md").read_text()


def test_from_pretrained_names_wrong_gates(gated: ZePAD, tmp_path: Path) -> None:
    gated.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, values = read_tensors(weights)[0], json.loads(config.read_text())
    key = "gate.hidden.weight"
    cases: list[tuple[dict[str, torch.Tensor], dict[str, Any], str]] = [
        ({name: tensor for name, tensor in tensors.items() if name != key}, values, r"lacks gate\.hidden\.weight"),
        ({**tensors, "gate.extra": torch.zeros(1)}, values, r"has the unknown gate\.extra"),
        ({**tensors, key: tensors[key][:, :3]}, values, r"has gate\.hidden\.weight .* instead of"),
        ({**tensors, "gate.out.bias": tensors["gate.out.bias"] + 9}, values, "answers a fixed image differently"),
        (tensors, {**values, "gate": {**values["gate"], "hidden": 10**9}}, "hidden: expected 1 to"),
        (tensors, {**values, "policy": "black_box"}, "policy: expected one of zero_sacrifice, white_box"),
        (tensors, {**values, "policy_caps": {"white_box": 1.5}}, r"policy_caps\.white_box: expected a share"),
        (tensors, {**values, "gate": None}, "has the unknown gate"),
    ]
    for given, about, message in cases:
        write_tensors(weights, given)
        config.write_text(json.dumps(about))
        with pytest.raises(ValueError, match=message):
            ZePAD.from_pretrained(tmp_path)


def test_set_policy_changes_the_cap_without_training(gated: ZePAD, images: torch.Tensor) -> None:
    before = gated.decide(images)
    once = gated.fuse(gated.branch_outputs(images), "white_box")
    torch.testing.assert_close(once.weights[2], before.weights[2] / 3)
    torch.testing.assert_close(gated.set_policy("white_box").decide(images).weights, once.weights)
    torch.testing.assert_close(gated.set_policy("zero_sacrifice").decide(images).logits, before.logits)
    for policy, model, message in (
        ("white_bx", gated, "did you mean 'white_box'"),
        ("white_box", gated.set_fusion("equal"), "the rule 'equal' and the policies: zero_sacrifice, white_box"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_policy(policy)  # type: ignore[arg-type]


def test_set_gate_refuses_what_does_not_fit(gated: ZePAD, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"made for .* \(24, 24\), .* the model has \(24, 24, 24\)"):
        gated.set_gate(FeatureGate(24, (24,)))
    with pytest.raises(ValueError, match="the fusion rule 'gated' needs a gate"):
        gated.set_gate(None)
    with pytest.raises(ValueError, match="no threshold"):
        gated.set_gate(FeatureGate(24, (24, 24)))
    assert gated.decide(images).gate is not None


def test_gate_works_on_shared_trunks_and_in_half_precision(gated: ZePAD, images: torch.Tensor) -> None:
    expected = gated.decide(images)
    gated.share_trunk()
    torch.testing.assert_close(gated.decide(images).gate, expected.gate, atol=1e-5, rtol=1e-4)
    half = RobustZeroShotClassifier(gated).to(dtype=torch.bfloat16).model.decide(images)
    assert half.gate is not None
    assert half.gate.dtype == torch.float32
    torch.testing.assert_close(half.gate, expected.gate, atol=0.1, rtol=0.1)


def test_gate_reads_unimodal_encoders_of_different_width(images: torch.Tensor, tmp_path: Path) -> None:
    """An SSL study: no text tower, trained heads."""
    parts = []
    for name, kind in (("robust", "timm: ViT"), ("benign", "timm: ResNet")):
        encoder = load_encoder(zoo.ZOO[kind](tmp_path / name).source)
        config = BranchConfig(name=name, role=name, source=encoder.source, head="linear")  # type: ignore[arg-type]
        parts.append(Branch(config, encoder, HEADS.get("linear")(encoder.feature_dim, len(CLASSES))))
    about = ZePADConfig(
        public_source=parts[1].config.source,
        branches=tuple(part.config for part in parts),
        class_names=CLASSES,
        fusion="gated",
    )
    widths = [part.encoder.feature_dim for part in parts]
    assert widths[0] != widths[1]
    model = ZePAD(about, parts, gate_for(widths, about.benign, GateConfig(threshold=0.0)))
    decision = model.decide(images)
    assert decision.gate is not None
    torch.testing.assert_close(decision.weights[1], torch.sigmoid(-2 * decision.gate))
    model.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(ZePAD.from_pretrained(tmp_path / "model").decide(images).gate, decision.gate)


def test_classifier_shows_what_the_gate_saw(gated: ZePAD, images: torch.Tensor) -> None:
    classifier = RobustZeroShotClassifier(gated)
    answers = {
        policy: classifier(images, ["a", "b"], return_evidence=True, policy=policy)  # type: ignore[call-overload]
        for policy in (None, "white_box")
    }
    decision = gated.decide(images)
    assert decision.gate is not None
    for index, (answer, careful) in enumerate(zip(*answers.values(), strict=True)):
        seen = answer["evidence"]["gate"]
        assert seen == {"logit": pytest.approx(float(decision.gate[index]), abs=1e-4), "threshold": 0.0}
        assert answer["evidence"]["flagged"] == (seen["logit"] > 0)
        weights = [each["evidence"]["weights"]["benign"] for each in (answer, careful)]
        assert weights[1] == pytest.approx(weights[0] / 3, rel=1e-3)
    assert RobustZeroShotClassifier(gated, policy="white_box").model.config.policy == "white_box"
