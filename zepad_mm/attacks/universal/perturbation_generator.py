"""Perturbations as the output of a small generator network with fixed noise, used by AdvEncoder and AdvCLIP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zepad_mm.attacks.base import project
from zepad_mm.attacks.perturbation import patch_size
from zepad_mm.attacks.universal.base import Surrogate, UniversalAttack

NOISE_DIM = 100  # length of one noise vector, as released
SIDE = 64  # side of the generator's output, as released


@dataclass(frozen=True, kw_only=True)
class GeneratorAttack(UniversalAttack):
    """A universal attack that trains a generator network; sub-classes define the loss."""

    steps: int = 60  # optimiser steps; 20 epochs as published
    batch_size: int = 32  # images per step; 256 as published
    maps: int = 16  # noise vectors, mixed by one convolution per colour channel; 256 as published
    width: int = 256  # channels of the generator's first layer, halved by each further one; 1024 as published
    learning_rate: float = 3e-4  # of Adam with betas (0.5, 0.999); 2e-4 as published

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.maps < 2 or self.width < 8 or not self.learning_rate > 0:
            raise ValueError(
                "expected maps >= 2 (batch statistics), width >= 8 and learning_rate > 0, "
                f"got {self.maps}, {self.width} and {self.learning_rate}"
            )

    def train(
        self, surrogate: Surrogate, generator: torch.Generator, total_loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """The delta of a generator trained to minimise ``total_loss(delta, batch)``, a scalar."""
        device = surrogate.images.device
        network = PerturbationGenerator(self.maps, self.width, generator).to(device)
        noise = torch.randn(self.maps, NOISE_DIM, 1, 1, generator=generator).to(device)
        parameters = list(network.parameters())
        optimiser = torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.5, 0.999))
        for batch in surrogate:
            loss = total_loss(self.draw(network, noise), batch)
            optimiser.zero_grad()
            loss.backward(inputs=parameters)
            optimiser.step()
        with torch.no_grad():
            return self.draw(network, noise)

    def draw(self, network: nn.Module, noise: Tensor) -> Tensor:
        """The generator's current delta: (3, image_size, image_size), or (3, h, w) for a patch."""
        delta = network(noise)
        size = (self.image_size, self.image_size)
        if self.norm == "patch":
            rows, columns = patch_size(size, self.epsilon)
            size = (max(rows, 1), max(columns, 1))
            delta = 0.5 + 0.5 * delta
        if size != (SIDE, SIDE):
            delta = F.interpolate(delta[None], size, mode="bilinear", align_corners=False)[0]
        return project(delta, self.epsilon, self.norm)


class PerturbationGenerator(nn.Module):
    """The DCGAN-like generator: noise (maps, 100, 1, 1) to one (3, 64, 64) map.

    Args:
        maps: number of noise vectors.
        width: channels of the first layer.
        generator: draws the weights, N(0, 0.02); the global RNG is not used.
    """

    def __init__(self, maps: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        widths = [width, width // 2, width // 4, width // 8]
        with torch.device("meta"):  # building layers on a real device would draw from the global RNG
            layers: list[nn.Module] = [nn.ConvTranspose2d(NOISE_DIM, width, 4, 1, 0, bias=False), _norm(width)]
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
        """Noise (maps, 100, 1, 1) to a map (3, 64, 64) in no particular budget."""
        drawn = self.draw(noise).transpose(0, 1)  # (3, maps, 64, 64)
        return torch.cat([mix(colour[None])[0] for mix, colour in zip(self.mix, drawn, strict=True)])


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)  # the batch is the same fixed noise in every step
