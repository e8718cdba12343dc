"""PAP: low-level layer lifting attacks (Ban and Dong, NeurIPS 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.activations import Activations, Layer, mean_square
from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, SignAscentAttack, Surrogate


@UNIVERSAL_ATTACKS.register("l4a_base")
@dataclass(frozen=True, kw_only=True)
class L4ABase(SignAscentAttack):
    """L4A-base: makes the activations of one low layer large (equation 3), mean square in place of the sum.

    As published: first stage of a ResNet or first block of a transformer (``layer=0.0``), plain sign steps of 2e-4. On
    the encoder that ships, whose 16 blocks are finer than those stages, a little deeper was stronger.
    """

    layer: Layer = 0.2  # depth from 0 to 1 among the blocks, or the dotted name of a module

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        with Activations(surrogate.encoders, self.layers()) as taken:

            def objective(delta: Tensor, batch: Tensor) -> Tensor:
                return surrogate.record_loss(self.lift(taken, delta, surrogate.perturb(delta, batch), generator))

            return self.ascend(surrogate, generator, objective)

    def layers(self) -> tuple[Layer, ...]:
        """The layers whose activations are lifted."""
        return (self.layer,)

    def lift(self, taken: Activations, delta: Tensor, attacked: Tensor, generator: torch.Generator) -> Tensor:
        """What is maximised, a scalar; ``attacked`` (B, 3, H, W) are real images with ``delta`` on them."""
        return torch.stack([mean_square(activation) for activation in taken(attacked)]).mean()


@UNIVERSAL_ATTACKS.register("l4a_fuse")
@dataclass(frozen=True, kw_only=True)
class L4AFuse(L4ABase):
    """L4A-fuse: base on two layers at once, the second weighed (equation 4)."""

    second_layer: Layer = 0.4  # as ``layer``
    second_weight: float = 1.0  # lambda of the paper

    def layers(self) -> tuple[Layer, ...]:
        return (self.layer, self.second_layer)

    def lift(self, taken: Activations, delta: Tensor, attacked: Tensor, generator: torch.Generator) -> Tensor:
        sizes = [mean_square(activation) for activation in taken(attacked)]
        return torch.stack(sizes[0::2]).mean() + self.second_weight * torch.stack(sizes[1::2]).mean()


@UNIVERSAL_ATTACKS.register("l4a_ugs")
@dataclass(frozen=True, kw_only=True)
class L4AUGS(L4ABase):
    """L4A-ugs: base on uniform-Gaussian samples, and a little on the real images (equation 5).

    A sample is an image of Gaussian noise; mean and deviation of each colour are drawn uniformly, anew at each step.
    """

    noise_size: int = 8  # Gaussian images per step
    noise_mean: tuple[float, float] = (0.4, 0.6)  # range that the mean of a colour is drawn from
    noise_std: tuple[float, float] = (0.05, 0.1)  # range that its standard deviation is drawn from
    real_weight: float = 0.01  # lambda of the released code: weight of the real images

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = (self.noise_mean, self.noise_std)
        if self.noise_size < 1 or any(not 0 <= low <= high <= 1 for low, high in ranges):
            raise ValueError(
                "expected noise_size >= 1 and noise_mean, noise_std as (low, high) in [0, 1], "
                f"got {self.noise_size}, {self.noise_mean} and {self.noise_std}"
            )

    def lift(self, taken: Activations, delta: Tensor, attacked: Tensor, generator: torch.Generator) -> Tensor:
        noise = self.samples((attacked.shape[-2], attacked.shape[-1]), generator).to(attacked)
        on_noise = super().lift(taken, delta, self.apply(noise, delta, generator), generator)
        return on_noise + self.real_weight * super().lift(taken, delta, attacked, generator)

    def samples(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Gaussian images (noise_size, 3, H, W) in [0, 1]."""
        mean, std = (
            torch.empty(self.noise_size, 3, 1, 1).uniform_(low, high, generator=generator)
            for low, high in (self.noise_mean, self.noise_std)
        )
        return (mean + std * torch.randn(self.noise_size, 3, *size, generator=generator)).clamp(0, 1)
