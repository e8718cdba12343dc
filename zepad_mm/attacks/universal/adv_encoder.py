"""AdvEncoder-PER (Zhou et al., ICCV 2023): a generator with fixed noise learns one perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.attacks.base import project
from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, Surrogate, UniversalAttack

NOISE = 100  # length of one noise vector, as released
SIDE = 64  # what the released generator draws


@UNIVERSAL_ATTACKS.register("adv_encoder")
@dataclass(frozen=True, kw_only=True)
class AdvEncoder(UniversalAttack):
    """AdvEncoder's perturbation, after the released code (CGCL-codes/AdvEncoder).

    Minimises ``adversarial_weight * -loss + MSE(x', x) - MSE(H(x'), H(x))`` with H an ideal high-pass filter. As
    published: ``maps=256, width=1024, learning_rate=2e-4, batch_size=256`` and 20 epochs; the defaults are what was
    strongest per second on a CPU.
    """

    loss: str = "info_nce"
    steps: int = 60  # optimiser steps; 20 epochs as published
    batch_size: int = 32  # pictures per step; 256 as published
    maps: int = 16  # noise vectors, mixed into one map by a convolution per colour; 256 as published
    width: int = 256  # channels of the generator's first layer, halved by each further one; 1024 as published
    learning_rate: float = 3e-4  # of Adam with betas (0.5, 0.999); 2e-4 as published
    adversarial_weight: float = 5.0  # of the feature loss against the two terms on the look of the picture
    high_pass_radius: float = 8.0  # radius of the removed centred disc of frequencies

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.maps < 2 or self.width < 8 or not self.learning_rate > 0:
            raise ValueError(
                "expected maps >= 2 (batch statistics), width >= 8 and learning_rate > 0, "
                f"got {self.maps}, {self.width} and {self.learning_rate}"
            )

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        device = surrogate.images.device
        network = PerturbationGenerator(self.maps, self.width, generator).to(device)
        noise = torch.randn(self.maps, NOISE, 1, 1, generator=generator).to(device)
        parameters = list(network.parameters())
        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.5, 0.999))
        for batch in surrogate:
            delta = self._draw(network, noise)
            loss = self._total_loss(delta, surrogate, batch)
            optimiser.zero_grad()
            loss.backward(inputs=parameters)
            optimiser.step()
        with torch.no_grad():
            return self._draw(network, noise)

    def _draw(self, network: nn.Module, noise: Tensor) -> Tensor:
        """The perturbation as the generator sees it now, (3, image_size, image_size)."""
        delta = network(noise)
        if self.image_size != SIDE:
            size = (self.image_size, self.image_size)
            delta = F.interpolate(delta[None], size, mode="bilinear", align_corners=False)[0]
        return project(delta, self.epsilon, self.norm)

    def _total_loss(self, delta: Tensor, surrogate: Surrogate, batch: Tensor) -> Tensor:
        """Equations 3 to 6 of the paper; the two squared errors are of delta alone, since H is linear."""
        quality = delta.square().mean()
        high_frequency = high_pass(delta, self.high_pass_radius).square().mean()
        return -self.adversarial_weight * surrogate.loss(delta, batch) + quality - high_frequency


class PerturbationGenerator(nn.Module):
    """The DCGAN-like generator: (maps, 100, 1, 1) noise to one (3, 64, 64) map, mixed by a convolution per colour.

    Args:
        maps: number of noise vectors.
        width: channels of the first layer.
        generator: draws the weights, N(0, 0.02); the global RNG is not touched.
    """

    def __init__(self, maps: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        widths = [width, width // 2, width // 4, width // 8]
        with torch.device("meta"):  # building layers on a real device would draw from the global RNG
            layers: list[nn.Module] = [nn.ConvTranspose2d(NOISE, width, 4, 1, 0, bias=False), _norm(width)]
            for before, after in pairwise(widths):
                layers += [nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), _norm(after)]
            layers += [nn.ReLU(), nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1, bias=False), nn.Tanh()]
            self.draw = nn.Sequential(*layers)
            self.mix = nn.ModuleList(nn.Conv2d(maps, 1, 3, padding=1) for _ in range(3))
        self.to_empty(device="cpu")
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    module.weight.normal_(0, 0.02, generator=generator)
                elif isinstance(module, nn.BatchNorm2d):
                    module.weight.normal_(1, 0.02, generator=generator)
                if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and module.bias is not None:
                    module.bias.zero_()

    def forward(self, noise: Tensor) -> Tensor:
        """(maps, 100, 1, 1) to (3, 64, 64), not yet inside any budget."""
        drawn = self.draw(noise).transpose(0, 1)  # (3, maps, 64, 64)
        return torch.cat([mix(colour[None])[0] for mix, colour in zip(self.mix, drawn, strict=True)])


def high_pass(picture: Tensor, radius: float) -> Tensor:
    """(..., H, W) without the frequencies in the centred disc of ``radius`` around zero frequency."""
    height, width = picture.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=picture.device)[:, None]
    columns = torch.fft.fftfreq(width, 1 / width, device=picture.device)[None]
    keep = rows.square() + columns.square() > radius**2
    return torch.fft.ifft2(torch.fft.fft2(picture) * keep).real


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)  # the batch of maps is always the same
