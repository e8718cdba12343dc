"""CSR: contrastive spectral rectification (Nie et al., arXiv 2601.19210)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduction.cross_defence.base import (
    DEFENCES,
    AuthorsAttack,
    Defence,
    Parts,
    Path,
    in_batches,
    lowest_share,
    mean_answer,
)
from zepad_mm.evaluation.subjects import EncoderWithHead

PUBLISHED_SIDE = 224  # pixels, of the images that the radius is published for


def low_pass(images: Tensor, radius: float) -> Tensor:
    """Images (B, 3, H, W) without high frequencies: a Gaussian of standard deviation ``radius`` in cycles per image."""
    height, width = images.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=images.device)
    columns = torch.fft.fftfreq(width, 1 / width, device=images.device)
    mask = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * radius**2))
    return torch.fft.ifft2(torch.fft.fft2(images) * mask).real.clamp(0, 1)


class CSR(Defence):
    """Purifies an image whose features change when its high frequencies are removed.

    Where the cosine of the features with and without high frequencies is below ``threshold``, sign steps move the image
    towards the features of its low-pass copy and away from its own; the best iterate is answered. The radius is the
    published one as a share of the image side. The threshold is set on clean images of the CLIP at hand.

    The attackers hold the purification constant in the backward pass, and also aim at the image, its low-pass copy and
    its purified copy at once, which keeps the features consistent.

    Args:
        model: encoder with head.
        threshold: cosine below which an image is purified.
        epsilon, step_size, steps: of the purification, in pixels of [0, 1].
    """

    attack: AuthorsAttack = "apgd_undefended"

    def __init__(
        self,
        model: EncoderWithHead,
        threshold: float = 0.85,
        epsilon: float = 4 / 255,
        step_size: float = 2 / 255,
        steps: int = 3,
    ) -> None:
        super().__init__()
        self.model = model
        self.threshold, self.epsilon, self.step_size, self.steps = threshold, epsilon, step_size, steps

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images + self._purification(images.detach()))

    def filtered(self, images: Tensor) -> Tensor:
        """The low-pass copies of images."""
        side = self.model.encoder.preprocess.image_size
        return low_pass(images, 40 * side / PUBLISHED_SIDE)

    def consistency(self, images: Tensor) -> Tensor:
        """(B,) cosine of the features of images and of their low-pass copies."""
        encoder = self.model.encoder
        return F.cosine_similarity(encoder(images), encoder(self.filtered(images)))

    def calibrate(self, images: Tensor) -> CSR:
        """Set the threshold so that few of these clean images (M, 3, H, W) are purified."""
        self.threshold = lowest_share(in_batches(self.consistency, images))
        return self

    def paths(self) -> list[Path]:
        def joint(images: Tensor) -> Tensor:
            return mean_answer(self.model(images), self.model(self.filtered(images)), self(images))

        return [Path("BPDA", self), Path("all views", joint, False, 3)]

    def _purification(self, images: Tensor) -> Tensor:
        """(B, 3, H, W): what is added to the images; zero for consistent ones."""
        encoder, found = self.model.encoder, torch.zeros_like(images)
        with torch.no_grad():
            own, target = (F.normalize(encoder(view), dim=-1) for view in (images, self.filtered(images)))
        rows = ((own * target).sum(-1) < self.threshold).nonzero()[:, 0]
        if len(rows):
            found[rows] = self._purified(images[rows], own[rows], target[rows]) - images[rows]
        return found

    @torch.enable_grad()
    def _purified(self, images: Tensor, own: Tensor, target: Tensor) -> Tensor:
        """The iterate of each image that is nearest to ``target`` and farthest from ``own``."""
        current, best = images, images
        best_score = torch.full_like(own[:, 0], -torch.inf)
        for step in range(self.steps):
            last = step == self.steps - 1
            current = current.detach().requires_grad_(not last)
            score = (F.normalize(self.model.encoder(current), dim=-1) * (target - own)).sum(-1)
            better = score.detach() > best_score
            best = torch.where(better[:, None, None, None], current.detach(), best)
            best_score = torch.where(better, score.detach(), best_score)
            if not last:
                (gradient,) = torch.autograd.grad(score.sum(), current)
                moved = current.detach() - images + self.step_size * gradient.sign()
                current = (images + moved.clamp(-self.epsilon, self.epsilon)).clamp(0, 1)
        return best


@DEFENCES.register("csr")
def build(parts: Parts) -> Defence:
    """Contrastive spectral rectification around the public CLIP."""
    return CSR(parts.undefended).calibrate(parts.calibration)
