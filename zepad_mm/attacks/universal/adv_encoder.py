"""AdvEncoder (Zhou et al., ICCV 2023): a generator network with fixed noise learns one perturbation or patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, FeatureAttack, PatchAttack, Surrogate
from zepad_mm.attacks.universal.perturbation_generator import GeneratorAttack


@UNIVERSAL_ATTACKS.register("adv_encoder")
@dataclass(frozen=True, kw_only=True)
class AdvEncoder(GeneratorAttack, FeatureAttack):
    """AdvEncoder-PER: a perturbation, following the released code (CGCL-codes/AdvEncoder).

    Minimises ``adversarial_weight * -loss + MSE(x', x) - MSE(H(x'), H(x))`` with H an ideal high-pass filter. As
    published: ``maps=256, width=1024, learning_rate=2e-4, batch_size=256`` and 20 epochs; the defaults are the
    strongest per second of crafting on a CPU.
    """

    loss: str = "info_nce"
    adversarial_weight: float = 5.0  # weight of the feature loss against the two image terms
    high_pass_radius: float = 8.0  # radius of the removed centred disc of frequencies

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        return self.train(surrogate, generator, lambda delta, batch: self.total_loss(surrogate, delta, batch))

    def total_loss(self, surrogate: Surrogate, delta: Tensor, batch: Tensor) -> Tensor:
        """Equations 3 to 6 of the paper; since H is linear, both squared errors depend on the change alone."""
        change = self.change(surrogate, delta, batch)
        quality = change.square().mean()
        high_frequency = high_pass(change, self.high_pass_radius).square().mean()
        return -self.adversarial_weight * surrogate.loss(delta, batch, self.criterion) + quality - high_frequency

    def change(self, surrogate: Surrogate, delta: Tensor, batch: Tensor) -> Tensor:
        """The change of the pixels, (..., 3, H, W): the delta itself."""
        return delta


@UNIVERSAL_ATTACKS.register("adv_encoder_patch")
@dataclass(frozen=True, kw_only=True)
class AdvEncoderPatch(PatchAttack, AdvEncoder):
    """AdvEncoder-PAT: a patch of 3 % of the area with the same losses.

    The paper places it in the lower right; the default is the centre, where it is much stronger on the embedded CLIP.
    """

    epsilon: float = 0.03  # share of the area
    norm: str = "patch"
    place: str = "center"  # "lower_right" as published, or "random", drawn for each image
    steps: int = 60
    learning_rate: float = 2e-3  # a patch of 11 x 11 pixels needs larger steps than a full-size perturbation

    def change(self, surrogate: Surrogate, delta: Tensor, batch: Tensor) -> Tensor:
        return surrogate.perturb(delta, batch) - surrogate.select(batch)


def high_pass(image: Tensor, radius: float) -> Tensor:
    """The image (..., H, W) without the frequencies within ``radius`` of zero."""
    height, width = image.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=image.device)[:, None]
    columns = torch.fft.fftfreq(width, 1 / width, device=image.device)[None]
    keep = rows.square() + columns.square() > radius**2
    return torch.fft.ifft2(torch.fft.fft2(image) * keep).real
