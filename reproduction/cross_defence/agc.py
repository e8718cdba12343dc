"""AGC: adaptive geodesic correction (Li et al., arXiv 2605.15584)."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduction.cross_defence.base import (
    DEFENCES,
    AuthorsAttack,
    Defence,
    Parts,
    Path,
    eot_batch,
    in_batches,
    mean_answer,
)
from zepad_mm.evaluation.subjects import EncoderWithHead

DISTORTIONS = (0.5, 0.3, 0.15)  # the first is that of the released code
FARTHEST = 0.3  # median cosine distance of the views of clean images that a distortion may cause


def random_perspective(images: Tensor, distortion: float = 0.5) -> Tensor:
    """Images (B, 3, H, W), each seen in another random perspective; black outside; differentiable.

    Every corner moves inwards by up to ``distortion`` of half the side, as in torchvision's ``RandomPerspective``.
    """
    count, device = len(images), images.device
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], device=device)
    moved = corners * (1 - distortion * torch.rand(count, 4, 2, device=device))
    # the homography that takes the moved corners, on the output, back to the corners of the input
    x, y = moved.unbind(-1)
    u, v = corners.expand(count, 4, 2).unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    rows = torch.cat(
        [
            torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], -1),
            torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], -1),
        ],
        1,
    )
    solved = torch.linalg.solve(rows, torch.cat([u, v], 1))
    matrix = torch.cat([solved, torch.ones(count, 1, device=device)], 1).view(count, 3, 3)
    height, width = images.shape[-2:]
    lines = [(torch.arange(size, device=device) * 2 + 1) / size - 1 for size in (height, width)]
    grid_y, grid_x = torch.meshgrid(*lines, indexing="ij")
    points = torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], -1).view(1, -1, 3) @ matrix.transpose(1, 2)
    grid = (points[..., :2] / points[..., 2:]).view(count, height, width, 2)
    return F.grid_sample(images, grid.to(images), mode="bicubic", align_corners=False).clamp(0, 1)


class AGC(Defence):
    """Rotates the feature of an image towards the mean feature of its random perspectives, on the unit sphere.

    The angle is ``beta`` times that between both. ``beta`` grows from ``beta_clean`` to ``beta_adversarial`` with the
    mean distance of the views from the image and with their agreement among each other, so that it may overshoot.
    Constants of the released code, which are for ViT-B/32: there the views of a clean image lie near it. For the CLIP
    at hand the distance is counted from its median over clean images (``usual``), and views are distorted as much as
    keeps them near (``calibrate``). The attackers go through the whole correction, with fewer views per step and new
    ones at each step, and also aim at the image and its views at once.

    Args:
        model: encoder with a zero-shot head.
        views: random perspectives per image; the released code takes 32.
        beta_clean, beta_adversarial: share of the angle for an image that looks clean, and for one that looks attacked.
        usual: mean cosine distance of the views from a clean image, in [0, 1).
        distortion: of the perspectives, in [0, 1].
    """

    attack: AuthorsAttack = "pgd_undefended"
    random = True
    averages = True

    def __init__(
        self,
        model: EncoderWithHead,
        views: int = 16,
        beta_clean: float = 0.45,
        beta_adversarial: float = 2.25,
        usual: float = 0.0,
        distortion: float = 0.5,
    ) -> None:
        super().__init__()
        self.model = model
        self.views, self.usual, self.distortion = views, usual, distortion
        self.beta_clean, self.beta_adversarial = beta_clean, beta_adversarial

    def forward(self, images: Tensor) -> Tensor:
        own, others = self.features(images, self.views)
        return self.model.head(self.corrected(own, others))

    def features(self, images: Tensor, views: int) -> tuple[Tensor, Tensor]:
        """Unit features (B, D) of images and (V, B, D) of their random perspectives."""
        seen = random_perspective(images.repeat(views, 1, 1, 1), self.distortion)
        features = F.normalize(self.model.encoder(torch.cat([images, seen])), dim=-1)
        return features[: len(images)], features[len(images) :].unflatten(0, (views, len(images)))

    def corrected(self, own: Tensor, others: Tensor) -> Tensor:
        """(B, D) unit features, moved towards the anchor."""
        anchor = F.normalize(others.mean(0), dim=-1)
        cosine = (own * anchor).sum(-1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6)
        direction = F.normalize(anchor - cosine * own, dim=-1)
        angle = self.beta(own, others)[:, None] * cosine.acos()
        return angle.cos() * own + angle.sin() * direction

    def beta(self, own: Tensor, others: Tensor) -> Tensor:
        """(B,) share of the angle."""
        views = len(others)
        outlier = ((self.distance(own, others) - self.usual) / (1 - self.usual)).clamp(1e-6, 1)
        total = others.sum(0).square().sum(-1)  # of all pairs of views, each with itself as well
        agreement = (total - views) / max(1, views * (views - 1)) if views > 1 else torch.ones_like(total)
        score = (outlier.pow(0.9) * ((agreement + 1) / 2).clamp(0, 1)).clamp(0, 1)
        return self.beta_clean + (self.beta_adversarial - self.beta_clean) * score

    def distance(self, own: Tensor, others: Tensor) -> Tensor:
        """(B,) mean cosine distance of the views from the image."""
        return 1 - (others * own).sum(-1).mean(0)

    def calibrate(self, images: Tensor) -> AGC:
        """Set the largest of ``DISTORTIONS`` whose views stay near clean images (M, 3, H, W), and ``usual`` with it."""
        for self.distortion in DISTORTIONS:
            self.usual = float(in_batches(lambda few: self.distance(*self.features(few, 8)), images).median())
            if self.usual <= FARTHEST:
                break
        return self

    def paths(self) -> list[Path]:
        few = copy.copy(self)
        few.views = min(4, self.views)

        def joint(images: Tensor) -> Tensor:
            own, others = few.features(images, few.views)
            answers = few.model.head(others.flatten(0, 1)).unflatten(0, others.shape[:2])
            return mean_answer(few.model.head(own), few.model.head(few.corrected(own, others)), *answers)

        views = few.views + 1
        return [Path("through, EOT", eot_batch(few, 1), False, views), Path("all views, EOT", joint, False, views)]


@DEFENCES.register("agc")
def build(parts: Parts) -> Defence:
    """Adaptive geodesic correction around the public CLIP."""
    return AGC(parts.undefended).calibrate(parts.calibration[::4])  # it sees many views of each
