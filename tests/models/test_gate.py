"""The feature gate by itself and inside a defended model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from zepad_mm.models.gate import FeatureGate, GateConfig

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
