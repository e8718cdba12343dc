"""ETU (Zhang, Huang and Bai, SIGIR 2024): a perturbation whose crops are adversarial too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, FeatureAttack, SignAscentAttack, Surrogate


@UNIVERSAL_ATTACKS.register("etu")
@dataclass(frozen=True, kw_only=True)
class ETU(SignAscentAttack, FeatureAttack):
    """Maximises the feature loss of ``x + delta``, ``x + crop(delta)`` and ``ScMix(x) + crop(delta)`` in turn.

    A crop is resized to the whole image. ScMix mixes two crops of an image with each other, then with another image
    of less weight. The paper computes all three in every step, with the loss "feature_kl"; taking turns costs a
    third, and the cosine loss is stronger on the embedded CLIP.
    """

    crop: tuple[float, float] = (0.5, 1.0)  # range of a crop's side as a share of the whole
    mix: float = 0.3  # weight of the other image in ScMix, below a half

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.crop
        if not 0 < low <= high <= 1 or not 0 <= self.mix < 0.5:
            raise ValueError(
                f"expected crop as (low, high) in (0, 1] and mix in [0, 0.5), got {self.crop} and {self.mix}"
            )

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        def objective(delta: Tensor, batch: Tensor) -> Tensor:
            turn = surrogate.steps_done % 3
            images = surrogate.select(batch)
            if turn == 2:
                images = self.scmix(images, generator)
            adversarial = self.apply(images, self.cropped(delta[None], generator)[0] if turn else delta, generator)
            losses = []
            for which, encoder in enumerate(surrogate.encoders):
                clean = surrogate.clean_features(which, batch)
                losses.append(self.criterion(encoder(adversarial), clean).mean())
            return surrogate.record_loss(torch.stack(losses).mean())

        return self.ascend(surrogate, generator, objective)

    def cropped(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A random square crop of (B, 3, H, W), the same for all images, resized to (H, W)."""
        height, width = images.shape[-2:]
        low, high = self.crop
        part = low + (high - low) * float(torch.rand((), generator=generator))
        rows, columns = max(1, round(part * height)), max(1, round(part * width))
        top = int(torch.randint(height - rows + 1, (), generator=generator))
        left = int(torch.randint(width - columns + 1, (), generator=generator))
        window = images[..., top : top + rows, left : left + columns]
        return F.interpolate(window, (height, width), mode="bilinear", align_corners=False)

    def scmix(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Scale mix and cross mix of images (B, 3, H, W) in [0, 1]."""
        weight = float(torch.rand((), generator=generator))
        own = weight * self.cropped(images, generator) + (1 - weight) * self.cropped(images, generator)
        return (1 - self.mix) * own + self.mix * images.roll(1, 0)
