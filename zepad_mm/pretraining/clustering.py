"""Clustering methods: SwAV."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVPrototypes, heads
from torch import Tensor

from zepad_mm.pretraining.base import METHODS, Learner


@METHODS.register("swav")
class SwAV(Learner):
    """Caron et al. 2020, arXiv 2006.09882, Eq. (1) and (2), with two views and without multi-crop or queue."""

    def build(self) -> None:
        self.projector = heads.SwaVProjectionHead(self.width, *self.sizes)
        self.prototypes = SwaVPrototypes(self.settings.projection_dim, self.settings.prototypes)
        self.prototypes.normalize()
        self.criterion = SwaVLoss(sinkhorn_gather_distributed=self.gather)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        scores = [self.prototypes(F.normalize(z, dim=1)) for z in (a, b)]
        return self.criterion(scores, []).squeeze()

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        self.prototypes.normalize()
