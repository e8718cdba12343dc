"""TTC: test-time counterattacks (Xing, Zhao and Sebe, CVPR 2025, arXiv 2503.03613)."""

from __future__ import annotations

import torch
from torch import Tensor

from reproduction.cross_defence.base import (
    DEFENCES,
    AuthorsAttack,
    Defence,
    Parts,
    Path,
    eot_batch,
    in_batches,
    lowest_share,
    mean_answer,
)
from zepad_mm.evaluation.subjects import EncoderWithHead


class TTC(Defence):
    """Moves an image away from its own features where random noise hardly moves them.

    Adversarial images are "falsely stable": uniform noise changes their features by a smaller share than those of
    clean images. Where that share is below ``tau``, PGD steps away from the image's features start from the noise, and
    the noise and all iterates are averaged with weights that grow by exp(beta) per step; elsewhere the noise stays.

    The released constants are for ViT-B/32 at 224 pixels; ``tau`` is set on clean images of the CLIP at hand. The
    attackers hold the counterattack constant in the backward pass (its steps are signs, without a gradient), average
    over the noise, and also aim at the image with and without it at once.

    Args:
        model: encoder with head.
        epsilon, step_size: of the counterattack, in pixels of [0, 1].
        steps: of the counterattack.
        tau: relative change of the features below which an image is counterattacked.
        beta: growth of the weights.
    """

    attack: AuthorsAttack = "pgd_undefended"
    random = True

    def __init__(
        self,
        model: EncoderWithHead,
        epsilon: float = 4 / 255,
        step_size: float = 1 / 255,
        steps: int = 2,
        tau: float = 0.2,
        beta: float = 2.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.epsilon, self.step_size, self.steps, self.tau, self.beta = epsilon, step_size, steps, tau, beta

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.counterattacked(images))

    def counterattacked(self, images: Tensor) -> Tensor:
        """The images with their counterattack, which is a constant to autograd."""
        return images + self._counterattack(images.detach())

    def noisy(self, images: Tensor) -> Tensor:
        """The images with uniform noise of the counterattack's size, in [0, 1]."""
        return (images + torch.empty_like(images).uniform_(-self.epsilon, self.epsilon)).clamp(0, 1)

    def relative_change(self, images: Tensor) -> Tensor:
        """(B,) how far noise moves the features, as a share of their length."""
        features = self.model.encoder(images)
        return (self.model.encoder(self.noisy(images)) - features).norm(dim=-1) / features.norm(dim=-1)

    def calibrate(self, images: Tensor) -> TTC:
        """Set ``tau`` so that few of these clean images (M, 3, H, W) are counterattacked."""
        self.tau = lowest_share(in_batches(self.relative_change, images))
        return self

    def paths(self) -> list[Path]:
        def joint(images: Tensor) -> Tensor:
            return mean_answer(self.model(images), self.model(self.noisy(images)), self(images))

        return [Path("BPDA, EOT", eot_batch(self, 2), False, 2), Path("all views, EOT", joint, False, 3)]

    @torch.enable_grad()
    def _counterattack(self, images: Tensor) -> Tensor:
        """(B, 3, H, W): what is added to the images."""
        clean = self.model.encoder(images).detach()
        current = self.noisy(images)
        deltas, stable = [current - images], torch.empty(0)
        for step in range(self.steps):
            current = current.detach().requires_grad_(True)
            features = self.model.encoder(current)
            if step == 0:
                change = (features.detach() - clean).norm(dim=-1) / clean.norm(dim=-1)
                stable = (change < self.tau)[:, None, None, None]
            (gradient,) = torch.autograd.grad((features - clean).square().sum(), current)
            moved = current.detach() - images + self.step_size * gradient.sign()
            current = (images + moved.clamp(-self.epsilon, self.epsilon)).clamp(0, 1)
            deltas.append(current - images)
        weights = torch.softmax(self.beta * torch.arange(len(deltas), device=images.device, dtype=images.dtype), 0)
        mixed = (weights.view(-1, 1, 1, 1, 1) * torch.stack(deltas)).sum(0)
        return torch.where(stable, mixed, deltas[0])


@DEFENCES.register("ttc")
def build(parts: Parts) -> Defence:
    """Test-time counterattacks around the public CLIP."""
    return TTC(parts.undefended).calibrate(parts.calibration)
