"""SharedTrunk: same outputs, weights held once, blocks below the adapters run once."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import encoder_zoo as zoo
from tests.helpers.encoder_checks import perturb_adapter, smooth_images
from zepad_mm.encoders import (
    Encoder,
    LoraSettings,
    SharedTrunk,
    add_lora,
    load_clip,
    load_encoder,
    load_lora,
    merge_lora,
    optimize_for_inference,
    set_gradient_checkpointing,
)
from zepad_mm.encoders.shared_trunk import blocks_of
from zepad_mm.models.branch import Branch, BranchConfig
from zepad_mm.models.heads import zero_shot_head
from zepad_mm.models.zepad import ZePAD, ZePADConfig

VITS = ["open_clip: ViT, MultiheadAttention", "open_clip: ViT, fused in_proj, q/k norm", "hf: CLIP", "hf: DINOv3"]


def three(source: str, first_block: int) -> list[Encoder]:
    """Two adapted encoders with different deltas, and the base."""
    encoders = [add_lora(load_encoder(source), LoraSettings(rank=2, first_block=first_block)) for _ in range(2)]
    for scale, encoder in enumerate(encoders, 1):
        for _ in range(scale):
            perturb_adapter(encoder)
    return [*(encoder.eval() for encoder in encoders), load_encoder(source)]


@pytest.mark.parametrize("name", [*VITS, "timm: ViT", "hf: ViT-MAE", "ssl: ViT of DINO"])
@pytest.mark.parametrize("first_block", [0, 2])
def test_shared_trunk_keeps_features_and_gradients(name: str, first_block: int, tmp_path: Path) -> None:
    encoders = three(zoo.ZOO[name](tmp_path).source, first_block)
    images = smooth_images(32, 32).requires_grad_(True)
    alone = torch.stack([encoder(images) for encoder in encoders])
    (gradient,) = torch.autograd.grad(alone.square().sum(), images)
    trunk = SharedTrunk(encoders)
    assert (trunk.shared_blocks, trunk.blocks) == (first_block, len(blocks_of(encoders[0].backbone)))
    together = torch.stack(trunk(images))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(together.square().sum(), images)[0], gradient, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack([encoder(images) for encoder in encoders]), alone, atol=1e-5, rtol=1e-5)


def test_shared_trunk_holds_weights_and_runs_blocks_once(tmp_path: Path) -> None:
    encoders = three(zoo.ZOO[VITS[0]](tmp_path).source, 2)
    runs: dict[int, int] = {}
    trunk = SharedTrunk(encoders)
    base = sum(p.numel() for p in load_encoder(encoders[2].source).parameters())
    adapters = sum(p.numel() for e in encoders for name, p in e.named_parameters() if "lora_" in name)
    assert sum(p.numel() for p in nn.ModuleList(encoders).parameters()) == base + adapters
    for encoder in encoders:
        for index, block in enumerate(blocks_of(encoder.backbone)):

            def count(module: nn.Module, inputs: object, index: int = index) -> None:
                runs[index] = runs.get(index, 0) + 1

            block.mlp.register_forward_pre_hook(count)
    trunk(smooth_images(32, 32))
    assert runs == {0: 1, 1: 1, 2: 3}


def test_shared_trunk_survives_saving_copying_and_folding(tmp_path: Path) -> None:
    encoders = three(zoo.ZOO[VITS[0]](tmp_path / "m").source, 1)
    images = smooth_images(32, 32)
    with torch.no_grad():
        alone = [encoder(images) for encoder in encoders]
        SharedTrunk(encoders)
        encoders[1].backbone.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
        torch.testing.assert_close(load_lora(load_encoder(encoders[1].source), tmp_path / "a")(images), alone[1])
        torch.testing.assert_close(copy.deepcopy(encoders[1])(images), alone[1])
        torch.testing.assert_close(optimize_for_inference(encoders[1], 32)(images), alone[1], atol=1e-5, rtol=1e-4)


def test_shared_trunk_is_thread_safe(tmp_path: Path) -> None:
    trunk = SharedTrunk(three(zoo.ZOO[VITS[0]](tmp_path).source, 2))
    batches = [smooth_images(32, 32) * factor for factor in (1.0, 0.8, 0.6, 0.4)]
    with torch.no_grad():
        expected = [torch.stack(trunk(images)) for images in batches]
        got: dict[int, list[torch.Tensor]] = {index: [] for index in range(4)}

        def work(index: int) -> None:
            with torch.no_grad():
                got[index] = [torch.stack(trunk(batches[index])) for _ in range(10)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, wanted in enumerate(expected):
        assert len(got[index]) == 10
        for answer in got[index]:
            torch.testing.assert_close(answer, wanted, atol=1e-6, rtol=1e-6)


def test_shared_trunk_rejects_unrelated_encoders(tmp_path: Path) -> None:
    source = zoo.ZOO["timm: ViT"](tmp_path / "vit").source
    other = zoo.ZOO["timm: ResNet"](tmp_path / "resnet").source
    with pytest.raises(ValueError, match="at least two encoders of one source, got 2 of"):
        SharedTrunk([load_encoder(source), load_encoder(other)])
    with pytest.raises(ValueError, match="at least two encoders"):
        SharedTrunk([load_encoder(source)])
    tuned = load_encoder(source)
    with torch.no_grad():
        next(tuned.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="differs between the encoders; only frozen ones"):
        SharedTrunk([load_encoder(source), tuned])
    with pytest.raises(ValueError, match="first_block: expected 0 to 2"):
        add_lora(load_encoder(source), LoraSettings(first_block=3))


@pytest.mark.parametrize("name", ["timm: ViT", "hf: CLIP", "open_clip: ViT, MultiheadAttention"])
def test_shared_trunk_rejects_gradient_checkpointing(name: str, tmp_path: Path) -> None:
    """A block that is run again in the backward pass would get what a shared call no longer holds."""
    encoders = three(zoo.ZOO[name](tmp_path).source, 1)
    set_gradient_checkpointing(encoders[1])
    with pytest.raises(ValueError, match="a shared trunk cannot recompute"):
        SharedTrunk(encoders)
    set_gradient_checkpointing(encoders[1], False)
    SharedTrunk(encoders)
    with pytest.raises(ValueError, match="shares a trunk, which cannot recompute"):
        set_gradient_checkpointing(encoders[1])


def test_zepad_share_trunk_keeps_outputs(clip_source: str, images: torch.Tensor, tmp_path: Path) -> None:
    """Outputs, gradients, single branches, files and optimized copies equal those of a model without sharing."""
    configs, branches = [], []
    text = load_clip(clip_source)[1]
    for encoder, name, role in zip(
        three(clip_source, 1), ("one", "two", "benign"), ("robust", "robust", "benign"), strict=True
    ):
        adaptation = "none" if role == "benign" else "lora"
        configs.append(BranchConfig(name=name, role=role, source=clip_source, adaptation=adaptation))
        branches.append(Branch(configs[-1], encoder, zero_shot_head(text, ("cat", "dog"), "single")))
    config = ZePADConfig(public_source=clip_source, branches=tuple(configs), class_names=("cat", "dog"))
    model = ZePAD(config, branches)
    x = images.clone().requires_grad_(True)
    expected = model.branch_logits(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    model.save_pretrained(tmp_path / "before")
    (trunk,) = model.share_trunk()
    assert (trunk.shared_blocks, trunk.blocks) == (1, 2)
    torch.testing.assert_close(model.branch_logits(x), expected)
    torch.testing.assert_close(torch.autograd.grad(model.branch_logits(x).square().sum(), x)[0], gradient)
    torch.testing.assert_close(model.branch("two")(images), expected[1])
    model.save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "branches/one/adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = ZePAD.from_pretrained(tmp_path / "after")
    loaded.share_trunk()
    torch.testing.assert_close(loaded.branch_logits(x), expected)
    torch.testing.assert_close(optimize_for_inference(model, 32).branch_logits(images), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.branch_logits(images), expected)
    merge_lora(model.branch("one").encoder)
    torch.testing.assert_close(model.branch("benign")(images), expected[2])
    torch.testing.assert_close(model.branch_logits(images), expected, atol=1e-5, rtol=1e-4)
