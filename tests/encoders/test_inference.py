"""Optimizations of tuning keep its results; the benchmarks run at a small size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zepad_mm.defences import FARE, Student
from zepad_mm.defences.base import Batch
from zepad_mm.encoders import LoraSettings, add_lora, folded_lora, load_encoder


def adapted() -> Student:
    encoder = load_encoder("open_clip:embedded", image_size=64).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_lora(encoder, LoraSettings(rank=2))
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return Student(encoder.eval(), nn.Identity())


def test_folded_lora_keeps_outputs_and_restores_weights() -> None:
    encoder = adapted().encoder
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    trains = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = encoder(images)
    with folded_lora(encoder):
        folded = encoder(images)
        assert not folded.requires_grad
    torch.testing.assert_close(folded, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="stop"), folded_lora(encoder):
        raise RuntimeError("stop")
    assert torch.equal(encoder(images), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert trains == [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16), folded_lora(encoder):
        layer = next(m for m in encoder.backbone.modules() if hasattr(m, "lora_A"))
        assert layer.get_base_layer().weight.dtype == torch.bfloat16
        assert bool(encoder(images).isfinite().all())
    assert torch.equal(encoder(images), expected)


def test_folded_lora_attacks_transfer_to_the_unfolded_network() -> None:
    student, defence = adapted(), FARE(epsilon=4 / 255, attack_steps=3)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original = student.encoder(images) + 0.01
    batch = Batch(images, torch.zeros(4, dtype=torch.long), torch.arange(4), original)
    attacked = defence.craft(student, batch, defence.epsilon, torch.Generator().manual_seed(0))
    loss = defence.attack_loss(student, batch)
    with torch.no_grad():
        assert float(loss(attacked).mean()) > 2 * float(loss(images).mean())
    assert float((attacked - images).abs().max()) <= defence.epsilon + 1e-6
