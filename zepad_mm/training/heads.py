"""Train heads on frozen encoders: all that is trained for a new task (method, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from zepad_mm.data import LabelledImages
from zepad_mm.encoders import Encoder
from zepad_mm.models.heads import HEADS, LinearHead, MLPHead
from zepad_mm.training.feature_cache import encode_images
from zepad_mm.utils.config import Config
from zepad_mm.utils.seeding import derived_generator, derived_seed, seeded


@dataclass(frozen=True, kw_only=True)
class HeadSettings(Config):
    """The paper's recipe for heads: Adam, exponential decay, clean images, the last epoch's head."""

    epochs: int = 20
    batch_size: int = 256
    lr: float = 5e-3
    weight_decay: float = 8e-4  # added to the gradient
    gamma: float = 0.96  # factor of the rate per epoch
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size: expected at least 1, got {self.epochs} and {self.batch_size}")


@dataclass(frozen=True)
class HeadResult:
    """Mean loss of each epoch, and the accuracy on the training features at the end, in [0, 1]."""

    losses: tuple[float, ...]
    train_accuracy: float


def fresh_head(kind: str, feature_dim: int, num_classes: int, seed: int = 0) -> nn.Module:
    """A head of a registered kind with weights drawn by ``seed``. Raises ValueError for an unknown kind."""
    head = HEADS.get(kind)
    with seeded(torch.device("cpu"), seed, "head", kind):
        return head(feature_dim, num_classes)


def train_head(
    encoder: Encoder,
    head: nn.Module,
    train: LabelledImages,
    settings: HeadSettings | None = None,
    accelerator: Accelerator | None = None,
) -> HeadResult:
    """Train ``head`` in place on the features of the frozen encoder; each image is encoded once, in eval mode.

    With several processes each encodes its share and all train the same head.
    """
    settings = settings or HeadSettings()
    features = encode_images(encoder, train.images, settings.batch_size, accelerator)
    return train_head_on_features(head, features, train.labels, settings)


def train_head_on_features(
    head: nn.Module, features: Tensor, labels: Tensor, settings: HeadSettings | None = None
) -> HeadResult:
    """Train ``head`` in place on features (N, D) and labels (N,).

    A linear or MLP head trains on features minus their mean, divided by one number, and takes features as they are
    afterwards: its first layer takes up both. Encoders differ by orders of magnitude in mean and spread; where the mean
    is large against the spread, the recipe's rate leaves a head at chance. All channels are divided by the same number,
    since a channel that is almost constant on clean images, once amplified, is what an attack moves.

    Raises:
        ValueError: a head without parameters, or labels beyond its classes. FloatingPointError: a non-finite loss.
    """
    settings = settings or HeadSettings()
    device = features.device
    head.to(device).train()
    labels = labels.to(device)
    parameters = list(head.parameters())
    if not parameters:
        raise ValueError(f"{type(head).__name__} has no parameters to train; use a 'linear' or 'mlp' head")
    with torch.no_grad():
        classes = head.eval()(features[:1]).shape[-1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())} for a head of {classes} classes")
    head.train()
    input_layer = _input_layer(head)
    mean, scale = (torch.zeros_like(features[0]), 1.0) if input_layer is None else _centre_and_scale(features)
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    losses = []
    with seeded(device, derived_seed(settings.seed, "head dropout")):
        for epoch in range(settings.epochs):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * settings.gamma**epoch
            order = torch.randperm(len(labels), generator=derived_generator(settings.seed, "head order", epoch))
            total = torch.zeros((), device=device)
            for index in order.to(device).split(settings.batch_size):
                loss = F.cross_entropy(head((features[index] - mean) / scale), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(index)
            losses.append(float(total) / len(labels))
            if losses[-1] != losses[-1] or losses[-1] == float("inf"):
                raise FloatingPointError(f"the head's loss is {losses[-1]} in epoch {epoch + 1}; lower lr")
    with torch.no_grad():
        if input_layer is not None:  # W (x - mean) / scale + b, written as a layer of x
            input_layer.weight.div_(scale)
            input_layer.bias.sub_(input_layer.weight @ mean)
        accuracy = float((head.eval()(features).argmax(-1) == labels).float().mean())
    return HeadResult(tuple(losses), accuracy)


def _input_layer(head: nn.Module) -> nn.Linear | None:
    """The layer of a linear or MLP head that takes the features; None for others, which may change features first."""
    return head.input_layer if type(head) is LinearHead or type(head) is MLPHead else None


def _centre_and_scale(features: Tensor) -> tuple[Tensor, float]:
    """The mean (D,) of features (N, D), and the root mean square of their spread; 1 where they do not differ."""
    mean = features.float().mean(0)
    scale = float(features.float().var(0, unbiased=False).mean().sqrt())
    rounding = torch.finfo(features.dtype).eps * float(mean.abs().max())
    return mean.to(features), scale if scale > 10 * rounding else 1.0
