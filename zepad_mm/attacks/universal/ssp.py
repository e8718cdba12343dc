"""SSP: the self-supervised perturbation (Naseer et al., CVPR 2020), made universal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.activations import Activations, Layer
from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, SignAscentAttack, Surrogate


@UNIVERSAL_ATTACKS.register("ssp")
@dataclass(frozen=True, kw_only=True)
class SSP(SignAscentAttack):
    """Drives the activations of a middle layer away from those of the clean images.

    The paper's feature distortion, the squared distance of equation 5, summed into one delta over the batches as the
    released code of L4A does. Each layer counts relative to the size of its clean activations, so that no encoder of
    several outweighs the others.
    """

    layer: Layer = 0.5  # depth from 0 to 1 among the blocks, or the dotted name of a module

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        with Activations(surrogate.encoders, (self.layer,)) as taken:

            def objective(delta: Tensor, batch: Tensor) -> Tensor:
                with torch.no_grad():
                    clean = taken(surrogate.select(batch))
                pairs = zip(taken(surrogate.perturb(delta, batch)), clean, strict=True)
                distances = [(now - before).square().mean() / before.square().mean() for now, before in pairs]
                return surrogate.record_loss(torch.stack(distances).mean())

            return self.ascend(surrogate, generator, objective)
