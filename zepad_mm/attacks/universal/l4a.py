"""L4A: low-level layer lifting attacks (Ban and Dong, NeurIPS 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.activations import Activations, Layer, mean_square
from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, SignAscentAttack, Surrogate


@UNIVERSAL_ATTACKS.register("l4a_base")
@dataclass(frozen=True, kw_only=True)
class L4ABase(SignAscentAttack):
    """L4A-base: maximises the mean square of the activations of one low layer (equation 3).

    As published: first stage of a ResNet or first block of a transformer (``layer=0.0``) and sign steps of 2e-4. A
    little deeper is stronger on the embedded CLIP, whose 16 blocks are smaller than those stages.
    """

    layer: Layer = 0.2  # depth from 0 to 1 among the blocks, or the dotted name of a module

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        with Activations(surrogate.encoders, self.layers()) as activations:

            def objective(delta: Tensor, batch: Tensor) -> Tensor:
                return surrogate.record_loss(self.lift(activations, delta, surrogate.perturb(delta, batch), generator))

            return self.ascend(surrogate, generator, objective)

    def layers(self) -> tuple[Layer, ...]:
        """The layers whose activations are maximised."""
        return (self.layer,)

    def lift(self, activations: Activations, delta: Tensor, adversarial: Tensor, generator: torch.Generator) -> Tensor:
        """The objective, a scalar; ``adversarial`` (B, 3, H, W) are the images with ``delta`` applied."""
        return torch.stack([mean_square(layer) for layer in activations(adversarial)]).mean()


@UNIVERSAL_ATTACKS.register("l4a_fuse")
@dataclass(frozen=True, kw_only=True)
class L4AFuse(L4ABase):
    """L4A-fuse: the objective of L4A-base on two layers, the second with a weight (equation 4)."""

    second_layer: Layer = 0.4  # as ``layer``
    second_weight: float = 1.0  # lambda of the paper

    def layers(self) -> tuple[Layer, ...]:
        return (self.layer, self.second_layer)

    def lift(self, activations: Activations, delta: Tensor, adversarial: Tensor, generator: torch.Generator) -> Tensor:
        sizes = [mean_square(layer) for layer in activations(adversarial)]
        return torch.stack(sizes[0::2]).mean() + self.second_weight * torch.stack(sizes[1::2]).mean()


@UNIVERSAL_ATTACKS.register("l4a_ugs")
@dataclass(frozen=True, kw_only=True)
class L4AUGS(L4ABase):
    """L4A-ugs: the objective of L4A-base on uniform-Gaussian samples and, with a small weight, on images (equation 5).

    A sample is an image of Gaussian noise whose mean and standard deviation are drawn uniformly at each step.
    """

    noise_size: int = 8  # noise images per step
    noise_mean: tuple[float, float] = (0.4, 0.6)  # range of the mean
    noise_std: tuple[float, float] = (0.05, 0.1)  # range of the standard deviation
    real_weight: float = 0.01  # weight of the images, lambda of the released code

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = (self.noise_mean, self.noise_std)
        if self.noise_size < 1 or any(not 0 <= low <= high <= 1 for low, high in ranges):
            raise ValueError(
                "expected noise_size >= 1 and noise_mean, noise_std as (low, high) in [0, 1], "
                f"got {self.noise_size}, {self.noise_mean} and {self.noise_std}"
            )

    def lift(self, activations: Activations, delta: Tensor, adversarial: Tensor, generator: torch.Generator) -> Tensor:
        noise = self.samples((adversarial.shape[-2], adversarial.shape[-1]), generator).to(adversarial)
        on_noise = super().lift(activations, delta, self.apply(noise, delta, generator), generator)
        return on_noise + self.real_weight * super().lift(activations, delta, adversarial, generator)

    def samples(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Noise images (noise_size, 3, H, W) in [0, 1]."""
        mean, std = (
            torch.empty(self.noise_size, 3, 1, 1).uniform_(low, high, generator=generator)
            for low, high in (self.noise_mean, self.noise_std)
        )
        return (mean + std * torch.randn(self.noise_size, 3, *size, generator=generator)).clamp(0, 1)
