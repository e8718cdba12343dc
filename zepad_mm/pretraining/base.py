"""The contract of pre-training methods: a module that maps two views of a batch to a loss, and a probe of its features.

To add a method, write a registered sub-class of :class:`Learner` with ``build`` and ``loss`` in the file of its family,
and import it in ``pretraining/__init__.py``; ``tests/recipes/test_pretraining_recipes.py`` then covers it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from zepad_mm.data import LabelledImages
from zepad_mm.utils.config import Config
from zepad_mm.utils.registry import Registry


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Config):
    """The hyperparameters of all methods; each method uses its own."""

    temperature: float = 0.2  # of NT-Xent and InfoNCE: simclr, nnclr, moco_v2_plus, moco_v3, supcon
    momentum: float = 0.98  # of target networks (byol, moco, ressl, dino); increases to 1
    hidden_dim: int = 512  # of the projection head
    projection_dim: int = 128  # for w_mse at most half of the batch size per process
    queue_size: int = 4096  # embeddings in the queue of moco_v2_plus, nnclr and ressl
    prototypes: int = 512  # of swav; output dimension of dino

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_dim", "projection_dim", "queue_size", "prototypes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.temperature <= 0 or not 0 <= self.momentum <= 1:
            raise ValueError(
                "temperature and momentum: expected a positive number and one in [0, 1], "
                f"got {self.temperature} and {self.momentum}"
            )


class Learner(nn.Module):
    """A pre-training method; ``forward`` returns the loss, so that DDP wraps the whole step.

    All state between steps (queues, prototypes, centres, target networks) is in parameters or buffers, so that
    ``state_dict`` is complete.

    Args:
        encoder: a timm model without a classifier; its ``pretrained_cfg`` has the mean and std of images.
        settings: hyperparameters.
        processes: number of processes; with several, embeddings are gathered where the method compares them.
    """

    projector: nn.Module
    mean: Tensor
    std: Tensor
    weak_second_view: ClassVar[bool] = False  # whether the second view is only cropped and flipped

    def __init__(self, encoder: nn.Module, settings: MethodSettings, processes: int) -> None:
        super().__init__()
        self.encoder, self.settings, self.gather = encoder, settings, processes > 1
        pixel: dict[str, Any] = encoder.pretrained_cfg  # type: ignore[assignment]
        self.register_buffer("mean", torch.tensor(pixel["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixel["std"]).view(1, 3, 1, 1), persistent=False)
        self.sizes = (settings.hidden_dim, settings.projection_dim)
        self.width: int = encoder.num_features  # type: ignore[assignment]
        self.target: nn.Sequential | None = None
        self._mixed = False  # whether the step runs in mixed precision
        self.build()

    def build(self) -> None:
        """Create ``projector``, which maps features (B, D) to embeddings (B, P), and other modules of the method."""
        raise NotImplementedError

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        """The loss (scalar) of the embeddings ``a``, ``b`` (B, P) of both views.

        ``views`` (2B, 3, S, S) are the normalised images, first views first, for a target network; ``labels`` (B,).
        """
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, S, S) in [0, 1]."""
        return self.encoder((images - self.mean) / self.std)

    def normalised(self, images: Tensor) -> Tensor:
        """Images in [0, 1] normalised for the encoder, in channels-last layout."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, view_a: Tensor, view_b: Tensor, labels: Tensor) -> Tensor:
        """The loss of two views (B, 3, S, S) in [0, 1] of the same images with ``labels`` (B,)."""
        views = self.normalised(torch.cat([view_a, view_b]))
        a, b = self.projector(self.encoder(views)).float().chunk(2)
        self._mixed = torch.is_autocast_enabled(views.device.type)
        with torch.autocast(views.device.type, enabled=False):  # whitening fails on products in bf16
            return self.loss(a, b, views, labels)

    def keep_statistics(self) -> None:
        """Let the encoder, and that of the target network, normalise by the running statistics that they have."""
        for encoder in (self.encoder, *([] if self.target is None else [self.target[0]])):
            for module in encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def add_target(self) -> None:
        """Create the target network, a copy of encoder and projector without gradients."""
        self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projector)).requires_grad_(False)

    @torch.no_grad()
    def embed_target(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """The target network's embeddings (B, P) of the first and of the second views."""
        if self.target is None:
            raise RuntimeError("no target network; call add_target in build")
        with torch.autocast(views.device.type, enabled=self._mixed):  # a network as large as the encoder
            a, b = self.target(views).float().chunk(2)
        return a, b

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        """Update the target network; called after each optimiser step."""
        if self.target is not None:
            update_momentum(self.encoder, self.target[0], momentum)
            update_momentum(self.projector, self.target[1], momentum)


def save_queue(bank: MemoryBankModule) -> MemoryBankModule:
    """The queue with its buffers in the state dict; lightly leaves them out, and a resumed run would lose them."""
    for name in ("bank", "bank_ptr"):
        buffer = getattr(bank, name)
        delattr(bank, name)
        bank.register_buffer(name, buffer)
    return bank


METHODS: Registry[type[Learner]] = Registry("pre-training method")


def make_learner(name: str, encoder: nn.Module, settings: MethodSettings, processes: int = 1) -> Learner:
    """A new learner of a registered method. Raises ValueError for an unknown method, with the nearest name."""
    return METHODS.get(name)(encoder, settings, processes)


@torch.no_grad()
def probe(learner: Learner, train: LabelledImages, held_out: LabelledImages, device: torch.device) -> dict[str, float]:
    """Return held-out accuracies of a cosine kNN (k = 20, T = 0.07) and of ridge regression on the frozen features."""
    learner.eval()
    sets = [
        (torch.cat([learner.features(x.to(device)).float().cpu() for x, _ in data.batches(500)]), data.labels)
        for data in (train, held_out)
    ]
    learner.train()
    (features, labels), (queries, truth) = sets
    onehot = F.one_hot(labels, len(train.class_names)).float()
    similarity = F.normalize(queries, dim=1) @ F.normalize(features, dim=1).T
    nearest = similarity.topk(min(20, len(labels)))
    votes = ((nearest.values / 0.07).exp().unsqueeze(-1) * onehot[nearest.indices]).sum(1)
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = torch.cat([(features - mean) / std, torch.ones(len(features), 1)], 1)
    query_inputs = torch.cat([(queries - mean) / std, torch.ones(len(queries), 1)], 1)
    gram = inputs.T @ inputs + 1e-3 * len(inputs) * torch.eye(inputs.shape[1])
    linear = query_inputs @ torch.linalg.solve(gram, inputs.T @ onehot)
    return {
        "knn_accuracy": float((votes.argmax(1) == truth).float().mean()),
        "linear_accuracy": float((linear.argmax(1) == truth).float().mean()),
    }
