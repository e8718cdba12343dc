"""Specifics of single universal attacks: patches, layers, heads, bandits, texts; published perturbation files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.io import savemat
from torch import Tensor, nn

from zepad_mm.attacks import (
    ETU,
    FFF,
    L4AUGS,
    PGD,
    SSP,
    UAP,
    UAPGD,
    AdvCLIP,
    AdvEncoderPatch,
    L4ABase,
    Perturbation,
    XTransfer,
    load_published,
    published_variants,
)
from zepad_mm.attacks.perturbation import paste
from zepad_mm.attacks.universal.activations import Activations, blocks_of
from zepad_mm.attacks.universal.surrogate_heads import cluster
from zepad_mm.attacks.universal.x_transfer import UpperConfidence
from zepad_mm.encoders import load_encoder

SIDE = 16


def make_encoder(seed: int = 0, width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2), nn.ReLU(inplace=True), nn.Conv2d(width, 6, 3), nn.ReLU(), nn.Flatten()
        ).eval()


@pytest.fixture
def surrogate() -> Tensor:
    coarse = torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("place", ["center", "lower_right", "random"])
@pytest.mark.parametrize("size", [(64, 64), (40, 100), (7, 5), (3, 3)])
def test_patch_keeps_its_area(place, size):
    images = torch.zeros(6, 3, *size)
    patch = Perturbation(torch.ones(3, 11, 11), 0.03, "patch", place=place)
    adversarial = patch(images)
    covered = (adversarial != images).any(1)
    assert covered.float().mean(dim=(1, 2)).max() <= 0.03
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    if size == (64, 64):
        assert covered.sum(dim=(1, 2)).eq(121).all()
        assert covered.flatten(1).unique(dim=0).shape[0] == (6 if place == "random" else 1)
        assert torch.equal(adversarial, patch(images))
        elsewhere = patch(images, generator=torch.Generator().manual_seed(5))
        assert torch.equal(elsewhere, adversarial) == (place != "random")


def test_patch_round_trips_and_bad_patches_raise(tmp_path):
    patch = Perturbation(torch.rand(3, 4, 4), 0.05, "patch", {"a": 1}, "random")
    patch.save(tmp_path / "p.safetensors")
    again = Perturbation.load(tmp_path / "p.safetensors", 0.05)
    assert torch.equal(again.delta, patch.delta)
    assert (again.place, again.norm, again.provenance) == ("random", "patch", {"a": 1})
    assert again.rescaled(0.2).place == "random"
    with pytest.raises(ValueError, match="of the area"):
        Perturbation.load(tmp_path / "p.safetensors", 0.03)
    with pytest.raises(ValueError, match="pixels in"):
        Perturbation(torch.full((3, 4, 4), 2.0), 0.03, "patch")
    with pytest.raises(ValueError, match=r"0\.03"):
        Perturbation(torch.zeros(3, 4, 4), 3, "patch")
    with pytest.raises(ValueError, match="place"):
        AdvEncoderPatch(place="left")
    with pytest.raises(ValueError, match="norm"):
        AdvEncoderPatch(norm="linf")
    with pytest.raises(ValueError, match="norm"):
        PGD(norm="patch")


def test_gradients_reach_a_patch():
    patch = torch.full((3, 2, 2), 0.5, requires_grad=True)
    paste(torch.zeros(2, 3, 8, 8), patch, 0.1, "random").sum().backward()
    assert patch.grad is not None
    assert patch.grad.eq(2).all()


def test_layers_by_depth_and_by_name(clip_source):
    encoder = load_encoder(clip_source)
    names = {module: name for name, module in encoder.named_modules()}
    found = [names[block] for block in blocks_of(encoder)]
    assert found[-2:] == ["backbone.transformer.resblocks.0", "backbone.transformer.resblocks.1"]
    images = torch.rand(2, 3, 32, 32)
    with Activations([encoder], [1.0, found[-1]]) as taken:
        last, named = taken(images)
    assert torch.equal(last, named)
    assert not any(module._forward_hooks for module in encoder.modules())
    with pytest.raises(ValueError, match=r"near: .*resblocks"):
        Activations([encoder], ["backbone.transformer.resblock.0"])
    with pytest.raises(ValueError, match="depth"):
        Activations([encoder], [2.0])
    with pytest.raises(ValueError, match=r"torch\.nn\.Module"):
        Activations([torch.flatten], [0.0])


def test_activations_are_copied_before_in_place_layers(surrogate):
    encoder = make_encoder()
    with Activations([encoder], ["0"]) as taken:
        assert taken(surrogate)[0].min() < 0


def test_ugs_draws_new_noise_images():
    attack = L4AUGS(noise_size=64)
    generator = torch.Generator().manual_seed(0)
    first, second = (attack.samples((32, 32), generator) for _ in range(2))
    assert not torch.equal(first, second)
    means, deviations = first.mean((2, 3)), first.std((2, 3))
    assert 0.38 < means.min() < 0.42
    assert 0.58 < means.max() < 0.62
    assert 0.045 < deviations.min() < deviations.max() < 0.11


def test_l4a_increases_the_activations(surrogate):
    encoder = make_encoder()
    made = L4ABase(image_size=SIDE, steps=20, layer="0").fit(encoder, surrogate)
    assert encoder[0](made(surrogate)).square().mean() > encoder[0](surrogate).square().mean()


def test_fff_ignores_the_images(surrogate):
    attack = FFF(image_size=SIDE, steps=5)
    first, second = (attack.fit(make_encoder(), images).delta for images in (surrogate, 1 - surrogate))
    assert torch.equal(first, second)


def test_cluster_finds_separated_clusters():
    corners = torch.eye(4, 9)[torch.arange(40) % 4] + 0.01 * torch.rand(40, 9)
    head = cluster(torch.stack([corners, corners.flip(0)]), 4, torch.Generator().manual_seed(3))
    answers = head(torch.stack([corners, corners.flip(0)])).argmax(-1)
    assert answers.shape == (2, 40)
    assert all((answers[0, kind::4] == answers[0, kind]).all() for kind in range(4))


def test_custom_head_replaces_pseudo_classes(surrogate):
    encoder = make_encoder()
    probe = nn.Linear(150, 5)
    for attack in (UAP(head=probe, steps=3, image_size=SIDE), UAPGD(head=probe, steps=10, image_size=SIDE)):
        made = attack.fit(encoder, surrogate)
        whole = replace(attack, head=nn.Identity()).fit(lambda images: probe(encoder(images)), surrogate)
        torch.testing.assert_close(made.delta, whole.delta)


def test_deepfool_changes_the_prediction(surrogate):
    encoder = make_encoder()
    images = surrogate * 0.5 + 0.25
    logits = nn.Sequential(encoder, nn.Linear(150, 5))
    answers = logits(images).argmax(-1)
    away = UAP(iterations=30).deepfool(logits, images, answers)
    assert (logits((images + away).clamp(0, 1)).argmax(-1) != answers).float().mean() > 0.8
    assert away.flatten(1).norm(dim=1).mean() < 5


def test_bandit_explores_all_arms_and_prefers_high_rewards():
    bandit = UpperConfidence(5, 0.05, 0.5)
    for _ in range(60):
        for arm in bandit.choose(2):
            bandit.reward(arm, 1.0 if arm == 3 else 0.1)
    assert min(bandit.visits) >= 1
    assert bandit.visits.index(max(bandit.visits)) == 3
    assert UpperConfidence(2, 2.0, 0.1).choose(5) == [0, 1]


def test_x_transfer_uses_k_encoders_per_step(surrogate):
    pool = {str(seed): make_encoder(seed) for seed in range(4)}
    calls: list[str] = []
    for name, encoder in pool.items():
        encoder.register_forward_hook(
            lambda module, inputs, output, name=name: calls.append(name) if inputs[0].requires_grad else None
        )
    XTransfer(image_size=SIDE, steps=6, k=2).fit(pool, surrogate)
    assert len(calls) == 12
    assert set(calls) == set(pool)


def test_etu_mixes_stay_in_range(surrogate):
    generator = torch.Generator().manual_seed(0)
    mixed = ETU().scmix(surrogate, generator)
    assert mixed.shape == surrogate.shape
    assert mixed.min() >= 0
    assert mixed.max() <= 1
    assert ETU().cropped(surrogate[:1], generator).shape == surrogate[:1].shape


def test_adv_clip_accepts_text_features(surrogate):
    encoder = make_encoder()
    attack = AdvCLIP(image_size=SIDE, steps=3, maps=2, width=8, clusters=3)
    without = attack.fit(encoder, surrogate)
    given = replace(attack, text_features=torch.randn(7, 150)).fit(encoder, surrogate)
    assert without.provenance["texts"] == "cluster centres"
    assert given.provenance["texts"] == "7 given"
    assert not torch.equal(without.delta, given.delta)
    with pytest.raises(ValueError, match="expected width 150"):
        replace(attack, text_features=torch.randn(7, 20)).fit(encoder, surrogate)


def test_universal_attack_on_a_zepad_model(zepad, images):
    encoders = {name: branch.encoder for name, branch in zepad.branches.items()}
    for attack in (SSP(image_size=32, steps=2), XTransfer(image_size=32, steps=3), UAPGD(image_size=32, steps=2)):
        assert attack.fit(encoders, images).provenance["encoders"] == ["full", "lora", "benign"]


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: UAP(rivals=0), "rivals"),
        (lambda: UAPGD(clusters=1), "clusters"),
        (lambda: UAPGD(head=3), "callable"),
        (lambda: FFF(noise_std=-1.0), "noise_std"),
        (lambda: XTransfer(k=0), "k >= 1"),
        (lambda: ETU(crop=(0.0, 1.0)), "crop"),
        (lambda: L4AUGS(noise_mean=(0.9, 0.1)), "noise_mean"),
        (lambda: AdvCLIP(text_features=torch.zeros(3)), r"\(T, D\)"),
    ],
)
def test_bad_settings_raise(build, says):
    with pytest.raises(ValueError, match=says):
        build()


RAW = (torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0)) - 0.5) / 10


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize(
    "laid", [RAW, RAW[None], RAW.permute(1, 2, 0), RAW.permute(1, 2, 0)[None]], ids=["chw", "1chw", "hwc", "1hwc"]
)
@pytest.mark.parametrize("kind", [".pt", ".npy", ".npz", ".mat", ".safetensors"])
def test_load_published(kind, laid, scale, tmp_path):
    path, laid = tmp_path / f"delta{kind}", (laid * scale).contiguous()
    if kind == ".pt":
        torch.save({"delta": nn.Parameter(laid)}, path)
    elif kind == ".npy":
        np.save(path, laid.numpy())
    elif kind == ".npz":
        np.savez(path, delta=laid.numpy())
    elif kind == ".mat":
        savemat(path, {"delta": laid.numpy(), "about": "text", "cell": np.array([1, "a"], dtype=object)})
    else:
        save_file({"delta": laid}, path)
    made = load_published(path)
    torch.testing.assert_close(made.delta, RAW)
    assert made.epsilon == pytest.approx(float(RAW.abs().max()))
    smaller = load_published(path, epsilon=2 / 255, image_size=12, scale=scale)
    assert smaller.delta.shape == (3, 12, 12)
    assert smaller.delta.abs().max() <= 2 / 255
    assert load_published(path, norm="l2", epsilon=0.1).delta.norm() <= 0.1 + 1e-6


@pytest.mark.parametrize(("shape", "fits"), [((40, 40), 2), ((8, 8), 2), ((8, 40), 2), ((16, 16), 1), ((40, 30), 2)])
def test_published_variants_keep_their_length(shape, fits, tmp_path):
    raw = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)) * 4 / 255
    np.save(tmp_path / "delta.npy", raw.numpy())
    variants = published_variants(tmp_path / "delta.npy", epsilon=10 / 255, image_size=16)
    assert [one.provenance["restore"] for one in variants] == ["original", "rescale", "sign"] * fits
    for one in variants:
        assert one.delta.shape == (3, 16, 16)
        if (one.provenance["fit"], one.provenance["restore"]) != ("crop", "original"):
            assert float(one.delta.abs().max()) == pytest.approx(min(10 / 255, float(raw.abs().max())), rel=1e-5)
    assert (variants[-1].delta.abs() == torch.tensor(10 / 255)).all()
    whole = variants[3].delta if fits == 2 else variants[0].delta  # cropped or tiled: pixels as in the file
    assert whole[0, 3, 5] in raw.clamp(-10 / 255, 10 / 255)


def test_load_published_with_fits_that_do_not_work(tmp_path):
    np.save(tmp_path / "delta.npy", RAW.numpy())
    for wrong, message in (
        ({"fit": "crop", "image_size": 12}, "fewer than 12 x 12"),
        ({"fit": "stretch"}, "fit: expected one of resize, crop, tile"),
        ({"restore": "sign", "norm": "patch", "epsilon": 0.03}, "of a patch the first"),
    ):
        with pytest.raises(ValueError, match=message):
            load_published(tmp_path / "delta.npy", **wrong)
    savemat(tmp_path / "cell.mat", {"delta": np.array([1, "a"], dtype=object)})
    with pytest.raises(ValueError, match=r"holds dict; name a tensor"):
        load_published(tmp_path / "cell.mat")
    (tmp_path / "text.mat").write_text("no matrix")
    with pytest.raises(ValueError, match="could not be read as plain tensors"):
        load_published(tmp_path / "text.mat")


def test_load_published_bad_files_raise(tmp_path):
    path = tmp_path / "delta.pt"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_published(path)
    torch.save({"a": RAW, "b": RAW}, path)
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*key="):
        load_published(path)
    assert load_published(path, key="b").delta.shape == (3, 6, 8)
    torch.save(make_encoder(), path)
    with pytest.raises(ValueError, match="never executed"):
        load_published(path)
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="never executed"):
        load_published(tmp_path / "pickled.npy")
    np.save(tmp_path / "flat.npy", np.zeros((5, 5)))
    with pytest.raises(ValueError, match=r"\(5, 5\); expected \(3, H, W\)"):
        load_published(tmp_path / "flat.npy")
    np.save(tmp_path / "nan.npy", np.full((3, 4, 4), np.nan))
    with pytest.raises(ValueError, match="NaN"):
        load_published(tmp_path / "nan.npy")
    np.save(tmp_path / "byte.npy", np.full((8, 8, 3), 200, dtype=np.uint8))
    with pytest.raises(ValueError, match="share of the area"):
        load_published(tmp_path / "byte.npy", norm="patch")
    assert load_published(tmp_path / "byte.npy", norm="patch", epsilon=0.03).delta.mean() == pytest.approx(200 / 255)
    with pytest.raises(ValueError, match="scale 1"):
        load_published(tmp_path / "byte.npy", scale=1)
    (tmp_path / "delta.txt").write_text("0")
    with pytest.raises(ValueError, match=r"\.npz"):
        load_published(tmp_path / "delta.txt")
    Perturbation(RAW, 0.1).save(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"Perturbation\.load"):
        load_published(tmp_path / "own.safetensors")
