"""The Encoder contract: images in [0, 1] to one feature vector per image, preprocessing inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zepad_mm.encoders.build_limits import ForwardLimit
from zepad_mm.encoders.image_size import set_image_size
from zepad_mm.encoders.sources import BACKENDS, at_revision, parse_source, with_image_size
from zepad_mm.encoders.state_dict import check_weights
from zepad_mm.utils.hub import Access
from zepad_mm.utils.images import Resize
from zepad_mm.utils.isolation import preserved_process_state
from zepad_mm.utils.registry import shorten
from zepad_mm.utils.validation import check_images


@dataclass(frozen=True, kw_only=True)
class Preprocess(Resize):
    """Differentiable resize and normalisation, applied inside the encoder so that attacks see the true network."""

    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]  # per channel, of pixels in [0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                "mean and std: expected three numbers each, of pixels in [0, 1], std above 0; "
                f"got {shorten(self.mean)} and {shorten(self.std)}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to what the backbone was trained on."""
        mean = torch.tensor(self.mean, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
        return (self.resize(images) - mean) / std


class Encoder(nn.Module):
    """Any backbone behind one interface.

    Args:
        backbone: maps normalised (B, 3, S, S) to features (B, D).
        preprocess: what happens to pixels in [0, 1] before.
        feature_dim: D.
        source: where the weights come from, e.g. ``"open_clip:ViT-B-32/laion2b_s34b_b79k"``.
    """

    def __init__(self, backbone: nn.Module, preprocess: Preprocess, feature_dim: int, source: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.preprocess = preprocess
        self.feature_dim = feature_dim
        self.source = source
        # convolutions run half again as fast so, on CPUs and on tensor cores; what is computed stays the same
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1], any size, to features (B, D). Raises ValueError for other ranges or shapes."""
        check_images(images)
        like = next(self.parameters())
        if images.device != like.device:
            raise ValueError(
                f"images are on {images.device}, the encoder on {like.device}; write images.to({str(like.device)!r})"
            )
        if torch.is_autocast_enabled(images.device.type):
            return self.backbone(self.preprocess(images))
        # pixels are resized in full precision; a network that was cast to 16 bits takes them in its own
        images = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        return self.backbone(self.preprocess(images).to(like.dtype))

    def extra_repr(self) -> str:
        return f"source={self.source!r}, feature_dim={self.feature_dim}, image_size={self.preprocess.image_size}"


def load_encoder(
    source: str,
    pretrained: bool = True,
    *,
    image_size: int | None = None,
    revision: str | None = None,
    access: Access | None = None,
) -> Encoder:
    """Load any backbone as an :class:`Encoder`, in eval mode.

    Args:
        source: ``open_clip:NAME/TAG``, ``open_clip:hf-hub:org/repo``, ``open_clip:local-dir:PATH``,
            ``open_clip:embedded``, any of them with ``+WEIGHTS`` (a robust state dict over that base);
            ``hf:org/name``, ``hf:org/name@revision``, ``hf:local-dir:PATH``; ``timm:NAME``, ``timm:local-dir:PATH``;
            ``ssl:CHECKPOINT``, ``ssl:CHECKPOINT?stem=3x3p1&mean=0.5,0.5,0.5``
            (see :mod:`zepad_mm.encoders.ssl_checkpoints`). Any of them with ``?image_size=N``, as for ``image_size``.
        pretrained: load the weights; False builds the architecture alone, randomly initialised.
        image_size: side in pixels, for towers that take another than their own: convolutional ones, and ViTs, whose
            position embeddings are interpolated. It becomes part of the encoder's ``source`` and so is stored with it.
        revision: commit, branch or tag on the Hub; None is what the source names, or the main branch.
        access: of the Hub: token, cache and the rest.

    Raises:
        ValueError: unknown kind or model, damaged weights, or an image size that the tower does not take;
        FileNotFoundError: the folder or file is missing;
        PermissionError, ConnectionError: see :func:`zepad_mm.utils.hub.fetch`.
    """
    source = with_image_size(source, image_size)
    parsed = parse_source(source)
    with preserved_process_state(pretrained), at_revision(parsed, revision, access or Access(), pretrained) as local:
        encoder = BACKENDS.get(parsed.kind).load(local, pretrained)
    check_weights(encoder, source)
    encoder.source = source
    if parsed.image_size is not None:
        set_image_size(encoder, parsed.image_size)
    return encoder.eval()


def feature_dim_of(backbone: nn.Module, image_size: int) -> int:
    """The feature width of a backbone, found by one forward pass. Raises ValueError unless it gives one vector."""
    parameter = next(backbone.parameters())
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad(), ForwardLimit(backbone, type(backbone).__name__):
        features = backbone(torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype))
    backbone.train(was_training)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ValueError(f"{type(backbone).__name__} gives {features!r:.80}; expected one (B, D) tensor of features")
    return int(features.shape[1])
