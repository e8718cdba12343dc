"""Redundancy-reduction methods: W-MSE, VICReg, VIbCReg, Barlow Twins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.loss import BarlowTwinsLoss, VICRegLoss, WMSELoss
from lightly.models.modules import heads
from lightly.utils import dist
from torch import Tensor, nn

from zepad_mm.pretraining.base import METHODS, Learner


@METHODS.register("vicreg")
class VICReg(Learner):
    """Bardes et al. 2021, arXiv 2105.04906, Eq. (6)."""

    def build(self) -> None:
        self.projector = heads.VICRegProjectionHead(self.width, *self.sizes)
        self.criterion: nn.Module = VICRegLoss(gather_distributed=self.gather)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(a, b)


@METHODS.register("barlow_twins")
class BarlowTwins(Learner):
    """Zbontar et al. 2021, arXiv 2103.03230, Eq. (1)."""

    def build(self) -> None:
        self.projector = heads.BarlowTwinsProjectionHead(self.width, *self.sizes)
        self.criterion = BarlowTwinsLoss(gather_distributed=self.gather)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(a, b)


@METHODS.register("w_mse")
class WMSE(Learner):
    """Ermolov et al. 2021, arXiv 2007.06346, Eq. (3)-(5): embeddings are whitened over the batch of each process."""

    def build(self) -> None:
        self.projector = heads.SimCLRProjectionHead(self.width, *self.sizes)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        size = a.shape[1]
        if 2 * size > len(a):
            raise ValueError(
                f"w_mse whitens {size} dimensions over {len(a)} images; set projection_dim to at most half of "
                f"batch_size, here {len(a) // 2}"
            )
        # running statistics are for inference, which does not use this head
        criterion = WMSELoss(size, eps=1e-4, track_running_stats=False, w_size=len(a))
        return criterion(torch.cat([a, b]))


@METHODS.register("vibcreg")
class VIbCReg(Learner):
    """Lee and Aune 2021, arXiv 2109.00783, with IterNorm after the projector and a normalised covariance."""

    weights = (25.0, 25.0, 200.0)  # of invariance, variance and covariance, as in solo-learn's CIFAR recipe

    def build(self) -> None:
        self.projector = heads.VICRegProjectionHead(self.width, *self.sizes)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        if self.gather:
            a, b = torch.cat(dist.gather(a)), torch.cat(dist.gather(b))
        a, b = iterative_whitening(torch.cat([a, b])).chunk(2)
        invariance = F.mse_loss(a, b)
        variance = torch.stack([F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b)]).sum()
        covariance = normalised_covariance(a) + normalised_covariance(b)
        return torch.stack([invariance, variance, covariance]) @ invariance.new_tensor(self.weights)


def normalised_covariance(z: Tensor) -> Tensor:
    """Mean square of the off-diagonal correlations of embeddings (B, P), VIbCReg's covariance term."""
    columns = F.normalize(z - z.mean(0), dim=0)
    correlation = columns.T @ columns
    return (correlation - torch.diag(correlation.diagonal())).square().mean()


def iterative_whitening(z: Tensor, steps: int = 5, epsilon: float = 1e-4) -> Tensor:
    """IterNorm (Huang et al. 2019, arXiv 1904.03441, Algorithm 1): embeddings (B, P), centred and nearly decorrelated.

    Uses ``steps`` Newton iterations towards the inverse root of the covariance, without eigenvectors.
    """
    centred = z - z.mean(0)
    eye = torch.eye(z.shape[1], device=z.device)
    covariance = centred.T @ centred / len(z) + epsilon * eye
    trace = covariance.trace()
    root = eye
    for _ in range(steps):
        root = 1.5 * root - 0.5 * root @ root @ root @ (covariance / trace)
    return centred @ root / trace.sqrt()
