"""FFF / GD-UAP: a data-free universal perturbation (Mopuri et al., BMVC 2017 and TPAMI 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.activations import Activations, Layer, mean_square
from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, SignAscentAttack, Surrogate


@UNIVERSAL_ATTACKS.register("fff")
@dataclass(frozen=True, kw_only=True)
class FFF(SignAscentAttack):
    """Maximises the log of the activations of every layer (equation 4) on noise; the images are not used.

    The input is the perturbation on Gaussian noise around grey (GD-UAP's range prior); ``noise_std=0`` is the
    perturbation on plain grey, as in FFF. The paper uses Adam and halves the delta when it saturates; here shrinking
    sign steps avoid saturation.
    """

    batch_size: int = 8  # noise images per step
    depth: float = 1.0  # share of the blocks, from the first, that count
    noise_std: float = 0.05  # of the noise around 0.5, in pixels of [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.depth <= 1 or not self.noise_std >= 0:
            raise ValueError(f"expected depth in [0, 1] and noise_std >= 0, got {self.depth} and {self.noise_std}")

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        device = surrogate.images.device
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        with Activations(surrogate.encoders, self.layers()) as activations:

            def objective(delta: Tensor, batch: Tensor) -> Tensor:
                noise = (0.5 + self.noise_std * torch.randn(shape, generator=generator)).clamp(0, 1)
                layers = activations(self.apply(noise.to(device), delta, generator))
                return surrogate.record_loss(
                    torch.stack([mean_square(layer).clamp_min(1e-20).log() for layer in layers]).mean()
                )

            return self.ascend(surrogate, generator, objective)

    def layers(self) -> tuple[Layer, ...]:
        """16 depths up to ``depth``; blocks of encoders with fewer blocks count more than once."""
        return tuple(self.depth * step / 15 for step in range(16))
