"""UAPGD (Deng and Karam, ICIP 2020): a universal perturbation by projected gradient steps on cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, SignAscentAttack, Surrogate
from zepad_mm.attacks.universal.surrogate_heads import PseudoLabelAttack


@UNIVERSAL_ATTACKS.register("uapgd")
@dataclass(frozen=True, kw_only=True)
class UAPGD(SignAscentAttack, PseudoLabelAttack):
    """Maximises the cross-entropy to the surrogate head's predictions on clean images.

    The paper runs PGD on one image at a time inside the loop of UAP, in place of DeepFool; here each step uses a batch.
    """

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        heads = self.heads(surrogate, generator)

        def objective(delta: Tensor, batch: Tensor) -> Tensor:
            adversarial = surrogate.perturb(delta, batch)
            losses = []
            for which, (encoder, head) in enumerate(zip(surrogate.encoders, heads, strict=True)):
                predictions = head(surrogate.clean_features(which, batch)).argmax(-1, keepdim=True)
                losses.append(-head(encoder(adversarial)).log_softmax(-1).gather(-1, predictions).mean())
            return surrogate.record_loss(torch.stack(losses).mean())

        return self.ascend(surrogate, generator, objective)
