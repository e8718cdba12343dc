"""Perturbation: exact round trips through files, and never out of budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from zepad_mm.attacks import Perturbation
from zepad_mm.attacks.base import NORMS
from zepad_mm.utils.io import read_tensors, write_tensors

EPSILON = {"linf": 10 / 255, "l2": 1.5}
PROVENANCE = {"attack": "FeatureUAP()", "images": 7, "final_loss": 0.25, "encoders": ["a"]}


def made(norm: str = "linf", size: int = 16, seed: int = 0) -> Perturbation:
    raw = torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))
    return Perturbation.fit_budget(raw, EPSILON[norm], norm, PROVENANCE)


def length(delta: torch.Tensor, norm: str) -> float:
    flat = delta.double().flatten(-3)
    return float((flat.abs().amax(-1) if norm == "linf" else flat.norm(dim=-1)).max())


@pytest.mark.parametrize("norm", NORMS)
def test_save_and_load_are_exact(norm, tmp_path):
    before = made(norm)
    before.save(tmp_path / "delta.safetensors")
    after = Perturbation.load(tmp_path / "delta.safetensors", epsilon=EPSILON[norm])
    assert torch.equal(before.delta, after.delta)
    assert (after.epsilon, after.norm, after.provenance) == (before.epsilon, before.norm, PROVENANCE)


def test_save_replaces_the_file(tmp_path):
    for seed in (0, 1):
        made(seed=seed).save(tmp_path / "delta.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["delta.safetensors"]
    assert torch.equal(Perturbation.load(tmp_path / "delta.safetensors").delta, made(seed=1).delta)


def test_load_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Perturbation.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("part", [0, 5, 100, 0.5, -1])
def test_load_truncated_file_raises(tmp_path, part):
    path = tmp_path / "delta.safetensors"
    made().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    with pytest.raises(ValueError, match=r"delta.safetensors is not a complete"):
        Perturbation.load(path)


def test_load_unknown_format_raises(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not a perturbation of zepad-mm.*weight"):
        Perturbation.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"epsilon": "x", "norm": "linf", "provenance": {}}'])
def test_damaged_metadata_names_the_file(tmp_path, text):
    path = tmp_path / "delta.safetensors"
    made().save(path)
    tensors, metadata = read_tensors(path)
    metadata = {"format": metadata["format"]} | ({} if text is None else {"perturbation": text})
    write_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"delta.safetensors is a damaged perturbation"):
        Perturbation.load(path)


def test_load_with_another_budget_raises_unless_rescaled(tmp_path):
    made().save(tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match=r"10/255, expected 8/255.*rescaled"):
        Perturbation.load(tmp_path / "delta.safetensors", epsilon=8 / 255)
    smaller = Perturbation.load(tmp_path / "delta.safetensors").rescaled(8 / 255)
    assert smaller.provenance["rescaled_from"] == 10 / 255
    torch.testing.assert_close(smaller.delta, made().delta * 0.8)


@pytest.mark.parametrize(
    ("delta", "epsilon", "norm", "says"),
    [
        (torch.zeros(1, 3, 4, 4), 0.1, "linf", r"\(3, H, W\)"),
        (torch.zeros(1, 4, 4), 0.1, "linf", r"\(3, H, W\)"),
        (torch.zeros(3, 0, 4), 0.1, "linf", r"\(3, H, W\)"),
        (torch.full((3, 4, 4), float("nan")), 0.1, "linf", "NaN"),
        (torch.full((3, 4, 4), 0.2), 0.1, "linf", "fit_budget"),
        (torch.full((3, 64, 64), 0.1 / 110 * 1.01), 0.1, "l2", "fit_budget"),
        (torch.zeros(3, 4, 4), 10, "linf", "8/255, not 8"),
        (torch.zeros(3, 4, 4), -1.0, "l2", "epsilon"),
        (torch.zeros(3, 4, 4), 0.1, "l7", "l7"),
    ],
)
def test_invalid_perturbations_raise(delta, epsilon, norm, says):
    with pytest.raises(ValueError, match=says):
        Perturbation(delta, epsilon, norm)


def test_provenance_must_be_json(tmp_path):
    bad = Perturbation(torch.zeros(3, 4, 4), 0.1, provenance={"model": object()})
    with pytest.raises(ValueError, match="plain JSON"):
        bad.save(tmp_path / "delta.safetensors")
    assert not list(tmp_path.iterdir())


def test_delta_is_copied_and_detached():
    raw = torch.zeros(3, 4, 4, dtype=torch.float64, requires_grad=True)
    made_of = Perturbation(raw * 1, 0.1)
    assert made_of.delta.dtype == torch.float32
    assert not made_of.delta.requires_grad


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    size=st.integers(1, 40),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_call_stays_in_budget_and_range_at_any_size(norm, size, height, width, seed):
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    adversarial = made(norm, size, seed)(images)
    assert adversarial.shape == images.shape
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert length(adversarial - images, norm) <= EPSILON[norm] + 1e-6


def test_clamped_at_black_and_white():
    shift = Perturbation(torch.full((3, 4, 4), 0.1), 0.1)
    assert torch.equal(shift(torch.ones(1, 3, 4, 4)), torch.ones(1, 3, 4, 4))
    torch.testing.assert_close(shift(torch.zeros(1, 3, 4, 4)), torch.full((1, 3, 4, 4), 0.1))


@pytest.mark.parametrize("norm", NORMS)
def test_zero_budget(norm):
    nothing = Perturbation.fit_budget(torch.ones(3, 4, 4), 0.0, norm)
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(nothing(images), images)
    with pytest.raises(ValueError, match="budget of 0"):
        nothing.rescaled(0.1)


def test_gradients_reach_the_images_through_it():
    images = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    made()(images).sum().backward()
    assert images.grad is not None
    assert (images.grad == 1).all()
