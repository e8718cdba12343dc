"""A small defence after a real training, and images with two cues, for tests of the evaluation."""

from __future__ import annotations

import copy
import functools

import torch
from torch import nn

from zepad_mm.attacks import PGD
from zepad_mm.data import LabelledImages
from zepad_mm.encoders import Encoder, Preprocess
from zepad_mm.evaluation import EvalData, EvalSettings
from zepad_mm.models.branch import Branch, BranchConfig, Role
from zepad_mm.models.heads import LinearHead
from zepad_mm.models.zepad import ZePAD, ZePADConfig

CLASSES = ("stripes", "bars", "checks")
SIZE = 16
SETTINGS = EvalSettings(
    threats=("clean", "T1", "T1b", "T2", "T3"),
    n_surrogate=64,
    batch_size=64,
    epsilon=4 / 255,
    universal_steps={"adv_encoder": 2, "feature_uap": 60},
    family_steps={"feature_uap": 60},
    universal=("feature_uap",),
    steps=6,
    restarts=1,
    own_attacks=("pgd",),
    adaptive=("average_logit", "weight_hijack"),
    detector_steps=5,
    diagnostics_n=24,
)


def toy(n: int, seed: int) -> LabelledImages:
    """Labelled images with two cues: a faint pattern, always right and easy to erase; a noisy, lasting tint."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    line = ((torch.arange(SIZE) // 2) % 2).float() * 2 - 1
    patterns = torch.stack([line.expand(SIZE, SIZE), line[:, None].expand(SIZE, SIZE), line[:, None] * line])
    tint = 0.07 * torch.eye(3)[labels] + 0.035 * torch.randn(n, 3, generator=generator)
    noise = 0.03 * torch.randn(n, 3, SIZE, SIZE, generator=generator)
    images = 0.45 + tint[:, :, None, None] + 0.014 * patterns[labels][:, None] + noise
    return LabelledImages(images.clamp(0, 1), labels, CLASSES, "toy")


@functools.cache
def _trained(name: str, role: Role, seed: int, epsilon: float) -> Branch:
    """A small network trained for a second, on PGD examples where epsilon is positive."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, stride=2, padding=1), nn.ReLU()
        )
        backbone.append(nn.Flatten())
        preprocess = Preprocess(image_size=SIZE, mean=(0.5,) * 3, std=(0.06,) * 3)
        encoder = Encoder(backbone, preprocess, 12 * (SIZE // 4) ** 2, f"toy:{name}")
        branch = Branch(
            BranchConfig(name=name, role=role, source=f"toy:{name}", head="linear"),
            encoder,
            LinearHead(encoder.feature_dim, 3),
        )
    data = toy(512, seed + 100)
    optimiser = torch.optim.Adam(branch.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(6):
        for images, labels in data.batches(64, generator):
            attack = PGD(epsilon=epsilon, steps=2, loss="ce", stop_when_wrong=False)
            optimiser.zero_grad()
            nn.functional.cross_entropy(branch(attack(branch, images, labels)), labels).backward()
            optimiser.step()
    optimiser.zero_grad()
    return branch.eval()


def trained(name: str, role: Role, seed: int, epsilon: float) -> Branch:
    """A copy of a network that is trained once in each process."""
    return copy.deepcopy(_trained(name, role, seed, epsilon))


def defended() -> ZePAD:
    """Two robust branches and a benign one."""
    branches = [
        trained("robust_a", "robust", 1, 6 / 255),
        trained("robust_b", "robust", 2, 6 / 255),
        trained("benign", "benign", 3, 0.0),
    ]
    configs = tuple(branch.config for branch in branches)
    model = ZePAD(ZePADConfig(public_source="toy:public", branches=configs, class_names=CLASSES), branches)
    model.set_undefended(trained("public", "benign", 8, 0.0))
    return model


def eval_data() -> EvalData:
    """Test, validation and surrogate."""
    return EvalData(toy(96, 7), toy(80, 8), toy(64, 9))
