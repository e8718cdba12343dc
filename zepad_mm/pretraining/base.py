"""What every method shares: the encoder, a projector, perhaps a slow twin; a batch of two views in, a loss out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from zepad_mm.utils.config import Config
from zepad_mm.utils.registry import Registry


@dataclass(frozen=True, kw_only=True)
class MethodSettings(Config):
    """The constants that methods share; each takes those that it has."""

    temperature: float = 0.2  # of NT-Xent and InfoNCE: simclr, nnclr, moco_v2_plus, moco_v3, supcon
    momentum: float = 0.98  # of slow twins (byol, moco, ressl, dino); rises to 1
    hidden_dim: int = 512  # of the projection head
    projection_dim: int = 128  # of w_mse at most half of a process's batch
    queue_size: int = 4096  # embeddings remembered by moco_v2_plus, nnclr and ressl
    prototypes: int = 512  # of swav; outputs of dino

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
    """A method of pre-training; ``forward`` is the loss, so that DDP wraps the whole step.

    Everything that outlives a step (queues, prototypes, centres, slow twins) is a parameter or a buffer, so that
    ``state_dict`` is all of a run's memory.

    Args:
        encoder: a timm model without a classifier; its ``pretrained_cfg`` has the mean and std of pictures.
        settings: constants.
        processes: how many run; with more than one the embeddings of all are gathered where the method compares them.
    """

    projector: nn.Module
    mean: Tensor
    std: Tensor
    weak_second_view: ClassVar[bool] = False  # the second view is cropped and flipped, its colours are left alone

    def __init__(self, encoder: nn.Module, settings: MethodSettings, processes: int) -> None:
        super().__init__()
        self.encoder, self.settings, self.gather = encoder, settings, processes > 1
        pixel: dict[str, Any] = encoder.pretrained_cfg  # type: ignore[assignment]
        self.register_buffer("mean", torch.tensor(pixel["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(pixel["std"]).view(1, 3, 1, 1), persistent=False)
        self.sizes = (settings.hidden_dim, settings.projection_dim)
        self.width: int = encoder.num_features  # type: ignore[assignment]
        self.target: nn.Sequential | None = None
        self.build()

    def build(self) -> None:
        """Make ``projector``, which maps features (B, D) to embeddings, and whatever else the method has."""
        raise NotImplementedError

    def loss(self, a: Tensor, b: Tensor, views: Tensor, labels: Tensor) -> Tensor:
        """The method's loss (scalar) of embeddings ``a``, ``b`` (B, P) of both views.

        ``views`` (2B, 3, S, S) are the normalised pictures, first views first, for a slow twin; ``labels`` (B,).
        """
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, 3, S, S) in [0, 1]."""
        return self.encoder((images - self.mean) / self.std)

    def normalised(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the encoder wants them, in the layout that convolutions are quick in."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, view_a: Tensor, view_b: Tensor, labels: Tensor) -> Tensor:
        """The loss of two views (B, 3, S, S) in [0, 1] of the same pictures, whose classes are ``labels`` (B,)."""
        views = self.normalised(torch.cat([view_a, view_b]))
        a, b = self.projector(self.encoder(views)).float().chunk(2)
        return self.loss(a, b, views, labels)

    def add_target(self) -> None:
        """A slow twin of encoder and projector, which no gradient reaches."""
        self.target = copy.deepcopy(nn.Sequential(self.encoder, self.projector)).requires_grad_(False)

    @torch.no_grad()
    def embed_target(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """The twin's embeddings (B, P) of the first and of the second views."""
        assert self.target is not None
        a, b = self.target(views).float().chunk(2)
        return a, b

    @torch.no_grad()
    def after_step(self, momentum: float) -> None:
        """Called when the optimiser has stepped: the twin follows."""
        if self.target is not None:
            update_momentum(self.encoder, self.target[0], momentum)
            update_momentum(self.projector, self.target[1], momentum)


def remembered(bank: MemoryBankModule) -> MemoryBankModule:
    """The same queue as part of the state: lightly's own is not saved, and a resumed run would forget it."""
    for name in ("bank", "bank_ptr"):
        buffer = getattr(bank, name)
        delattr(bank, name)
        bank.register_buffer(name, buffer)
    return bank


METHODS: Registry[type[Learner]] = Registry("method of pre-training")


def make_learner(name: str, encoder: nn.Module, settings: MethodSettings, processes: int = 1) -> Learner:
    """A fresh learner of a registered method. Raises ValueError for an unknown one, with the nearest name."""
    return METHODS.get(name)(encoder, settings, processes)
