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
    """Maximises the distance of a middle layer's activations from the clean ones.

    The paper's feature distortion, the squared distance of equation 5, with one delta for all batches as in the
    released code of L4A. Distances are relative to the clean activations, so that several encoders weigh the same.
    """

    layer: Layer = 0.5  # depth from 0 to 1 among the blocks, or the dotted name of a module

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        with Activations(surrogate.encoders, (self.layer,)) as activations:

            def objective(delta: Tensor, batch: Tensor) -> Tensor:
                with torch.no_grad():
                    clean = activations(surrogate.select(batch))
                pairs = zip(activations(surrogate.perturb(delta, batch)), clean, strict=True)
                distances = [
                    (adversarial - clean).square().mean() / clean.square().mean() for adversarial, clean in pairs
                ]
                return surrogate.record_loss(torch.stack(distances).mean())

            return self.ascend(surrogate, generator, objective)
