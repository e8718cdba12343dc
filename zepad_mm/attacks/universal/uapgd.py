"""UAPGD (Deng and Karam, ICIP 2020): universal perturbations by projected gradient steps on a cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, SignAscentAttack, Surrogate
from zepad_mm.attacks.universal.surrogate_heads import PseudoLabelAttack


@UNIVERSAL_ATTACKS.register("uapgd")
@dataclass(frozen=True, kw_only=True)
class UAPGD(SignAscentAttack, PseudoLabelAttack):
    """Raises the cross-entropy to the answers on clean images, those of the attacker's own head.

    The paper runs PGD image by image inside the loop of UAP, in place of DeepFool; here each step is of a batch.
    """

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        heads = self.heads(surrogate, generator)

        def objective(delta: Tensor, batch: Tensor) -> Tensor:
            attacked = surrogate.perturb(delta, batch)
            losses = []
            for which, (encoder, head) in enumerate(zip(surrogate.encoders, heads, strict=True)):
                answers = head(surrogate.clean_features(which, batch)).argmax(-1, keepdim=True)
                losses.append(-head(encoder(attacked)).log_softmax(-1).gather(-1, answers).mean())
            return surrogate.record_loss(torch.stack(losses).mean())

        return self.ascend(surrogate, generator, objective)
