"""Images for the training of a feature gate: several sources behind one row number, and what leaves them clean."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.data import LabelledImages, StoredImages
from zepad_mm.data.corruptions import CORRUPTIONS, Corruption
from zepad_mm.training.gate_settings import CROP, DOWNSCALE
from zepad_mm.utils.validation import check_images

CHECKED = 16  # images of each source in a checksum
Images = Tensor | LabelledImages | StoredImages  # labels are never read


class ImagePool:
    """Images of several sources behind one row number; a source may stay on disk.

    Raises ValueError for no source, an empty one, or images of different sizes.
    """

    def __init__(self, sources: Mapping[str, Images]) -> None:
        self.sources = dict(sources)
        if not self.sources or not all(len(images) for images in self.sources.values()):
            raise ValueError(f"images: expected at least one image of each source, got {self._sizes()}")
        self.starts = torch.tensor([0, *(len(images) for images in self.sources.values())]).cumsum(0)
        shapes = {name: tuple(self._take(name, torch.tensor([0])).shape[1:]) for name in self.sources}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"images: expected one size for all sources, got {shapes}; load them at one image_size")
        self.image_size = next(iter(shapes.values()))[-1]

    def _sizes(self) -> dict[str, int]:
        return {name: len(images) for name, images in self.sources.items()}

    def rows(self, source: str) -> Tensor:
        """The row numbers of a source."""
        place = list(self.sources).index(source)
        return torch.arange(int(self.starts[place]), int(self.starts[place + 1]))

    def fetch(self, rows: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] at ``rows`` (B,), on the CPU."""
        fetched: list[tuple[Tensor, Tensor]] = []
        for place, name in enumerate(self.sources):
            own = ((rows >= self.starts[place]) & (rows < self.starts[place + 1])).nonzero().flatten()
            if len(own):
                fetched.append((own, self._take(name, rows[own] - self.starts[place])))
        images = torch.cat([images for _, images in fetched])
        return check_images(images[torch.cat([own for own, _ in fetched]).argsort()])

    def checksum(self) -> str:
        """Names, sizes and a checksum of a few images of each source."""
        crc = 0
        for name, images in self.sources.items():
            few = self._take(name, torch.linspace(0, len(images) - 1, CHECKED).long())
            crc = zlib.crc32(few.contiguous().numpy().data, crc)
        return f"{self._sizes()} {crc}"

    def _take(self, name: str, rows: Tensor) -> Tensor:
        images = self.sources[name]
        return (images[rows] if isinstance(images, Tensor) else images.fetch(rows)).float().cpu()


@dataclass(frozen=True)
class Examples:
    """Features of one kind of images.

    Attributes:
        group: "clean", "corrupted", "universal", "held_out", "per_image", "stopped" or "gate_aware".
        kind: which of the group, e.g. "fff", or a number.
        attacked: the label.
        features: (n, D) of the benign encoder and, beside them, of the robust ones.
        rows: (n,) of the pool.
    """

    group: str
    kind: str
    attacked: bool
    features: Tensor
    rows: Tensor

    @property
    def name(self) -> str:
        return self.group if self.kind in ("", self.group) else f"{self.group}: {self.kind}"

    def at(self, rows: Tensor) -> Examples:
        """Those of the given rows of the pool."""
        return self.select(torch.isin(self.rows, rows))

    def without(self, rows: Tensor) -> Examples:
        """Those of other rows of the pool."""
        return self.select(~torch.isin(self.rows, rows))

    def select(self, mask: Tensor) -> Examples:
        return replace(self, features=self.features[mask], rows=self.rows[mask])


def corruption(name: str) -> Corruption:
    """A registered corruption, or one of the two that only change scale and position."""
    return {CROP: crop_flip, DOWNSCALE: downscale}.get(name) or CORRUPTIONS.get(name)


def crop_flip(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """One random crop, of 95 % down to 75 % of the side, resized again, and mirrored with probability 1/2."""
    side = images.shape[-1]
    size = max(1, round(side * (1 - 0.05 * severity)))
    top, left = torch.randint(side - size + 1, (2,), generator=generator).tolist()
    cropped = images[..., top : top + size, left : left + size]
    cropped = cropped.flip(-1) if torch.rand(1, generator=generator) < 0.5 else cropped
    return F.interpolate(cropped, (side, side), mode="bilinear", align_corners=False).clamp(0, 1)


def downscale(images: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Reduced to 90 % down to 50 % of the side and enlarged again."""
    side = images.shape[-1]
    size = max(1, round(side * (1 - 0.1 * severity)))
    small = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return F.interpolate(small, (side, side), mode="bilinear", align_corners=False).clamp(0, 1)
