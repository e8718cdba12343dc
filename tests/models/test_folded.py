"""Folded encoders: whole-model attacks see the same gradients, and never those of old weights."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor

from zepad_mm.encoders.lora import has_lora
from zepad_mm.models.zepad import ZePAD


def gradient(model: ZePAD, images: Tensor) -> Tensor:
    attacked = images.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(model(attacked)[:, 0].sum(), attacked)
    return found


def test_folded_gradients_are_those_of_the_model(zepad: ZePAD, images: Tensor) -> None:
    expected = gradient(zepad, images)  # its parameters ask for gradients: nothing is folded
    state = torch.get_rng_state()
    zepad.requires_grad_(False)
    found = gradient(zepad, images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
    lora, attacked = zepad.branch("lora").encoder, images.clone().requires_grad_(True)
    assert has_lora(lora)
    assert not has_lora(zepad._encoder("lora", attacked))
    assert zepad._encoder("lora", images) is lora
    for part in (copy.deepcopy(zepad), pickle.loads(pickle.dumps(zepad._folded))):
        assert not (part._folded if isinstance(part, ZePAD) else part)._made


def test_folded_encoders_follow_the_weights(zepad: ZePAD, images: Tensor) -> None:
    zepad.requires_grad_(False)
    first = gradient(zepad, images)
    weight = next(iter(zepad.branch("full").parameters()))
    weight.add_(0.1 * torch.randn_like(weight))
    changed = gradient(zepad, images)
    assert not torch.allclose(first, changed)
    zepad.requires_grad_(True)
    torch.testing.assert_close(changed, gradient(zepad, images), atol=1e-4 * float(first.abs().max()), rtol=1e-3)


def test_hooks_of_encoders_run_under_attack(zepad: ZePAD, images: Tensor) -> None:
    zepad.requires_grad_(False)
    gradient(zepad, images)
    calls = []
    handle = next(iter(zepad.branch("lora").encoder.children())).register_forward_hook(lambda *_: calls.append(1))
    gradient(zepad, images)
    assert calls
    handle.remove()


def test_loaded_model_is_frozen_and_folded(zepad: ZePAD, images: Tensor, tmp_path) -> None:
    zepad.save_pretrained(tmp_path)
    loaded = ZePAD.from_pretrained(tmp_path)
    attacked = images.clone().requires_grad_(True)
    loaded(attacked).sum().backward()
    assert attacked.grad is not None
    assert all(parameter.grad is None for parameter in loaded.parameters())
    assert set(loaded._folded._made) == {"full", "lora", "benign"}
