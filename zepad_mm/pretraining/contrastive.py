"""Contrastive methods: SimCLR, SupCon, MoCo v2+, MoCo v3, NNCLR, and SwAV, which contrasts cluster assignments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss, SwaVLoss
from lightly.models.modules import NNMemoryBankModule, SwaVPrototypes, heads
from lightly.utils import dist
from torch import Tensor

from zepad_mm.pretraining.base import METHODS, Learner, save_queue


@METHODS.register("simclr")
class SimCLR(Learner):
    """Chen et al. 2020, arXiv 2002.05709, Eq. (1)."""

    def build(self) -> None:
        self.projector = heads.SimCLRProjectionHead(self.width, *self.sizes)
        self.criterion = NTXentLoss(self.settings.temperature, gather_distributed=self.gather)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(a, b)


@METHODS.register("supcon")
class SupCon(Learner):
    """Khosla et al. 2020, arXiv 2004.11362, Eq. (2): positives are images of the same class; needs labels."""

    def build(self) -> None:
        self.projector = heads.SimCLRProjectionHead(self.width, *self.sizes)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        own, classes = F.normalize(torch.cat([a, b]), dim=1), torch.cat([labels, labels])
        everyone, all_classes, first = own, classes, 0
        if self.gather:
            everyone = torch.cat(dist.gather(own))
            all_classes, first = torch.cat(dist.gather(classes.float())).long(), dist.rank() * len(own)
        return supervised_contrastive(own, classes, everyone, all_classes, first, self.settings.temperature)


def supervised_contrastive(
    own: Tensor, classes: Tensor, everyone: Tensor, all_classes: Tensor, first: int, temperature: float
) -> Tensor:
    """Eq. (2) of SupCon, for anchors ``own`` (N, P): the rows from ``first`` of ``everyone`` (M, P).

    All embeddings have unit length. An anchor without a positive contributes 0.
    """
    similarity = own @ everyone.T / temperature
    itself = torch.zeros_like(similarity, dtype=torch.bool)
    rows = torch.arange(len(own), device=own.device)
    itself[rows, rows + first] = True
    log_share = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (classes[:, None] == all_classes[None]) & ~itself
    count = positive.sum(1)
    mean = log_share.masked_fill(~positive, 0).sum(1) / count.clamp_min(1)
    return -mean[count > 0].sum() / len(own)


@METHODS.register("moco_v2_plus")
class MoCoV2Plus(Learner):
    """MoCo v2 (Chen et al. 2020, arXiv 2003.04297) in its symmetric form, as solo-learn's "MoCo v2+".

    Both views are queries, and both keys enter the queue, which holds keys of earlier batches only.
    """

    def build(self) -> None:
        self.projector = heads.MoCoProjectionHead(self.width, *self.sizes)
        self.add_target()
        self.criterion = NTXentLoss(
            self.settings.temperature,
            memory_bank_size=(self.settings.queue_size, self.settings.projection_dim),
            gather_distributed=self.gather,
        )
        save_queue(self.criterion.memory_bank)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        key_a, key_b = self.embed_target(views)
        # one call: in a second one, the queue would hold keys of the same images as negatives
        return self.criterion(torch.cat([a, b]), torch.cat([key_b, key_a]))


@METHODS.register("moco_v3")
class MoCoV3(Learner):
    """Chen et al. 2021, arXiv 2104.02057, Eq. (1) and Algorithm 1: the negatives are the keys of the batch."""

    def build(self) -> None:
        self.projector = heads.MoCoProjectionHead(self.width, *self.sizes, num_layers=3, batch_norm=True)
        size = self.settings.projection_dim
        self.predictor = heads.MoCoProjectionHead(size, self.settings.hidden_dim, size, batch_norm=True)
        self.add_target()

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        key_a, key_b = self.embed_target(views)
        return self._contrast(self.predictor(a), key_b) + self._contrast(self.predictor(b), key_a)

    def _contrast(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query.float(), dim=1), F.normalize(key, dim=1)
        target = torch.arange(len(query), device=query.device)
        if self.gather:
            key, target = torch.cat(dist.gather(key)), target + dist.rank() * len(query)
        return 2 * self.settings.temperature * F.cross_entropy(query @ key.T / self.settings.temperature, target)


@METHODS.register("nnclr")
class NNCLR(Learner):
    """Dwibedi et al. 2021, arXiv 2104.14548, Eq. (2) and (3): the positive is the nearest embedding in a queue."""

    def build(self) -> None:
        size = self.settings.projection_dim
        self.projector = heads.NNCLRProjectionHead(self.width, *self.sizes)
        self.predictor = heads.NNCLRPredictionHead(size, self.settings.hidden_dim, size)
        self.neighbours = save_queue(NNMemoryBankModule((self.settings.queue_size, size)))
        self.neighbours.gather_distributed = self.gather
        self.criterion = NTXentLoss(self.settings.temperature, gather_distributed=self.gather)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        predicted_a, predicted_b = self.predictor(a), self.predictor(b)
        near_a = self.neighbours(a.detach(), update=False)
        near_b = self.neighbours(b.detach(), update=True)
        return (self.criterion(near_a, predicted_b) + self.criterion(near_b, predicted_a)) / 2


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
