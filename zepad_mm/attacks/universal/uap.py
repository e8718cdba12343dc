"""UAP (Moosavi-Dezfooli et al., CVPR 2017): DeepFool steps of single images, gathered in one perturbation."""

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
    """For the images whose answer stands yet: DeepFool from where they are, and the results are added up.

    Algorithm 1 of the paper on batches: DeepFool (its algorithm 2, for L2) runs on all images of a batch side by
    side, and the sum of what it found is added and projected, where the paper adds image after image. The answers
    are those of the attacker's own head.
    """

    steps: int = 40  # batches
    batch_size: int = 32
    clusters: int = 10
    rivals: int = 3  # other answers that DeepFool looks at, the nearest ones; 9 as published
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
        # the paper begins at zero; a start inside the budget spares the steps that break symmetry
        delta = random_delta(like, 0.1 * self.epsilon, self.norm, generator)[0]
        for batch in surrogate:
            delta = project(delta + self.gather(surrogate, delta, batch, heads), self.epsilon, self.norm)
        return delta

    def gather(self, surrogate: Surrogate, delta: Tensor, batch: Tensor, heads: list[Head]) -> Tensor:
        """The sum over images and encoders of DeepFool's ways out, as (3, image_size, image_size)."""
        attacked = surrogate.perturb(delta, batch)
        total, fooled = torch.zeros_like(attacked[0]), []
        for which, (encoder, head) in enumerate(zip(surrogate.encoders, heads, strict=True)):
            clean = head(surrogate.clean_features(which, batch))
            with torch.no_grad():
                now = head(encoder(attacked)).argmax(-1)
            fooled.append((now != clean.argmax(-1)).float().mean())
            for branch, answers in enumerate(clean.argmax(-1).reshape(-1, len(batch))):

                def logits(pixels: Tensor, encoder: Model = encoder, head: Head = head, branch: int = branch) -> Tensor:
                    found = head(encoder(pixels))
                    return found.reshape(-1, *found.shape[-2:])[branch]

                stands = now.reshape(-1, len(batch))[branch] == answers
                if bool(stands.any()):
                    total += self.deepfool(logits, attacked[stands], answers[stands]).sum(0)
        surrogate.record_loss(torch.stack(fooled).mean())
        if total.shape != delta.shape:
            total = F.interpolate(total[None], delta.shape[-2:], mode="bilinear", align_corners=False)[0]
        return total

    def deepfool(self, logits: Model, images: Tensor, answers: Tensor) -> Tensor:
        """The shortest change (B, 3, H, W), to first order, after which ``logits`` no longer gives ``answers`` (B,)."""
        change = torch.zeros_like(images)
        for _ in range(self.iterations):
            pixels = (images + (1 + self.overshoot) * change).clamp(0, 1).requires_grad_(True)
            found = logits(pixels)
            stands = found.argmax(-1) == answers
            if not bool(stands.any()):
                break
            own = found.gather(-1, answers[:, None])
            others = found.scatter(-1, answers[:, None], -torch.inf)
            gaps = others.topk(min(self.rivals, found.shape[-1] - 1)).values - own  # (B, rivals), negative
            slopes = torch.stack(
                [torch.autograd.grad(gap.sum(), pixels, retain_graph=True)[0] for gap in gaps.unbind(-1)], dim=1
            )
            lengths = slopes.flatten(2).norm(dim=-1).clamp_min(1e-12)
            away = gaps.detach().abs() + 1e-4  # a little beyond the border, as released
            best = (away / lengths).argmin(-1)
            row = torch.arange(len(pixels), device=pixels.device)
            steps = (away[row, best] / lengths[row, best].square())[:, None, None, None] * slopes[row, best]
            change = change + steps.nan_to_num(0.0) * stands[:, None, None, None]
        return (1 + self.overshoot) * change
