"""UAP (Moosavi-Dezfooli et al., CVPR 2017): DeepFool steps on images, accumulated in one perturbation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.base import Model, project, random_delta
from zepad_mm.attacks.universal.base import UNIVERSAL_ATTACKS, Surrogate
from zepad_mm.attacks.universal.surrogate_heads import Head, PseudoLabelAttack


@UNIVERSAL_ATTACKS.register("uap")
@dataclass(frozen=True, kw_only=True)
class UAP(PseudoLabelAttack):
    """Adds up the DeepFool perturbations of the images whose prediction has not changed yet.

    Algorithm 1 of the paper on batches: DeepFool (its algorithm 2, for L2) runs on all images of a batch in parallel,
    and the sum of its perturbations is added and projected, where the paper adds one image at a time. Predictions are
    those of the surrogate head.
    """

    steps: int = 40  # batches
    batch_size: int = 32
    clusters: int = 10
    rivals: int = 3  # nearest other classes that DeepFool considers; 9 as published
    iterations: int = 3  # of DeepFool; up to 50 as published
    overshoot: float = 0.02  # of DeepFool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rivals < 1 or self.iterations < 1 or not self.overshoot >= 0:
            raise ValueError(
                "expected rivals >= 1, iterations >= 1 and overshoot >= 0, "
                f"got {self.rivals}, {self.iterations} and {self.overshoot}"
            )

    def run(self, surrogate: Surrogate, generator: torch.Generator) -> Tensor:
        heads = self.heads(surrogate, generator)
        like = surrogate.images.new_empty(1, 3, self.image_size, self.image_size)
        # the paper starts at zero; a small random start saves the steps that break the symmetry
        delta = random_delta(like, 0.1 * self.epsilon, self.norm, generator)[0]
        for batch in surrogate:
            delta = project(delta + self.accumulate(surrogate, delta, batch, heads), self.epsilon, self.norm)
        return delta

    def accumulate(self, surrogate: Surrogate, delta: Tensor, batch: Tensor, heads: list[Head]) -> Tensor:
        """The sum of DeepFool perturbations over images and encoders, (3, image_size, image_size)."""
        adversarial = surrogate.perturb(delta, batch)
        total, fooled = torch.zeros_like(adversarial[0]), []
        for which, (encoder, head) in enumerate(zip(surrogate.encoders, heads, strict=True)):
            clean = head(surrogate.clean_features(which, batch))
            with torch.no_grad():
                current = head(encoder(adversarial)).argmax(-1)
            fooled.append((current != clean.argmax(-1)).float().mean())
            for branch, predictions in enumerate(clean.argmax(-1).reshape(-1, len(batch))):

                def logits(pixels: Tensor, encoder: Model = encoder, head: Head = head, branch: int = branch) -> Tensor:
                    output = head(encoder(pixels))
                    return output.reshape(-1, *output.shape[-2:])[branch]

                unchanged = current.reshape(-1, len(batch))[branch] == predictions
                if bool(unchanged.any()):
                    total += self.deepfool(logits, adversarial[unchanged], predictions[unchanged]).sum(0)
        surrogate.record_loss(torch.stack(fooled).mean())
        if total.shape != delta.shape:
            total = F.interpolate(total[None], delta.shape[-2:], mode="bilinear", align_corners=False)[0]
        return total

    def deepfool(self, logits: Model, images: Tensor, predictions: Tensor) -> Tensor:
        """The shortest perturbations (B, 3, H, W), to first order, that change ``predictions`` (B,)."""
        change = torch.zeros_like(images)
        for _ in range(self.iterations):
            pixels = (images + (1 + self.overshoot) * change).clamp(0, 1).requires_grad_(True)
            output = logits(pixels)
            unchanged = output.argmax(-1) == predictions
            if not bool(unchanged.any()):
                break
            own = output.gather(-1, predictions[:, None])
            others = output.scatter(-1, predictions[:, None], -torch.inf)
            gaps = others.topk(min(self.rivals, output.shape[-1] - 1)).values - own  # (B, rivals), negative
            slopes = torch.stack(
                [torch.autograd.grad(gap.sum(), pixels, retain_graph=True)[0] for gap in gaps.unbind(-1)], dim=1
            )
            lengths = slopes.flatten(2).norm(dim=-1).clamp_min(1e-12)
            away = gaps.detach().abs() + 1e-4  # slightly beyond the decision boundary, as released
            best = (away / lengths).argmin(-1)
            row = torch.arange(len(pixels), device=pixels.device)
            steps = (away[row, best] / lengths[row, best].square())[:, None, None, None] * slopes[row, best]
            change = change + steps.nan_to_num(0.0) * unchanged[:, None, None, None]
        return (1 + self.overshoot) * change
