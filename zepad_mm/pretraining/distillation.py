"""Self-distillation methods, with a momentum-updated target network: BYOL, DINO, ReSSL."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss, NegativeCosineSimilarity
from lightly.models.modules import heads
from lightly.models.modules.memory_bank import MemoryBankModule
from torch import Tensor, nn

from zepad_mm.pretraining.base import METHODS, Learner, save_queue


@METHODS.register("byol")
class BYOL(Learner):
    """Grill et al. 2020, arXiv 2006.07733, Eq. (2)."""

    def build(self) -> None:
        self.projector = heads.BYOLProjectionHead(self.width, *self.sizes)
        self.predictor = heads.BYOLPredictionHead(self.settings.projection_dim, *self.sizes)
        self.add_target()
        self.criterion = NegativeCosineSimilarity()

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        target_a, target_b = self.embed_target(views)
        return (self.criterion(self.predictor(a), target_b) + self.criterion(self.predictor(b), target_a)) / 2


@METHODS.register("dino")
class DINO(Learner):
    """Caron et al. 2021, arXiv 2104.14294, Eq. (3) and Algorithm 1, with two global views and no multi-crop."""

    def build(self) -> None:
        self.projector = self._head()
        target_head = self._head()  # new, since modules with weight normalisation cannot be copied
        target_head.load_state_dict(self.projector.state_dict())
        self.target = nn.Sequential(copy.deepcopy(self.encoder), target_head).requires_grad_(False)
        self.criterion = DINOLoss(self.settings.prototypes)

    def _head(self) -> nn.Module:
        return heads.DINOProjectionHead(self.width, *self.sizes, self.settings.prototypes, batch_norm=True)

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(list(self.embed_target(views)), [a, b])


@METHODS.register("ressl")
class ReSSL(Learner):
    """Zheng et al. 2021, arXiv 2107.09282, Eq. (4)-(6): matches the target network's similarities to a queue."""

    weak_second_view = True
    student_temperature, teacher_temperature = 0.1, 0.04  # as published

    def build(self) -> None:
        self.projector = heads.SimCLRProjectionHead(self.width, *self.sizes)
        self.add_target()
        size = (self.settings.queue_size, self.settings.projection_dim)
        self.queue = save_queue(MemoryBankModule(size, gather_distributed=self.gather))

    def forward(self, view_a: Tensor, view_b: Tensor, labels: Tensor) -> Tensor:
        if self.target is None:
            raise RuntimeError("no target network; call add_target in build")
        query = F.normalize(self.projector(self.encoder(self.normalised(view_a))).float(), dim=1)
        with torch.no_grad():
            key = F.normalize(self.target(self.normalised(view_b)).float(), dim=1)
            _, others = self.queue(key, update=True)
        with torch.autocast(query.device.type, enabled=False):  # as in Learner.forward
            return relational_loss(query, key, others, self.student_temperature, self.teacher_temperature)


def relational_loss(query: Tensor, key: Tensor, others: Tensor, student: float, teacher: float) -> Tensor:
    """Eq. (6) of ReSSL: cross-entropy between the similarities of ``key`` and ``query`` (B, P) to ``others`` (P, K).

    All have unit length; ``student`` and ``teacher`` are temperatures.
    """
    targets = (key @ others / teacher).softmax(1)
    return -(targets * (query @ others / student).log_softmax(1)).sum(1).mean()
