"""The one conversion of images to float tensors in [0, 1], and the resize rule of encoders.

Data sets, classifier, attacks and server read images here, so that the same file gives the same pixels everywhere:

- Formats are those of :data:`FORMATS`; no other is opened, in particular none for which Pillow starts a program (EPS).
- The EXIF orientation is applied. Of an animation the first frame is read.
- Grey, palette, CMYK, YCbCr and HSV become RGB; alpha is dropped, as the encoders' own libraries do.
- 16-bit grey is divided by 65535. 32-bit floats are read if they are in [0, 1]. Everything else is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.utils.config import Config
from zepad_mm.utils.text import without_addresses

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
WIDEST = 32  # aspect ratio beyond which an image is cropped before it is resized
LARGEST_SIDE = 8192  # of images that a model wants, in pixels

T = TypeVar("T")
Interpolation = Literal["bilinear", "bicubic"]
ResizeMode = Literal["squash", "shortest"]


@dataclass(frozen=True, kw_only=True)
class Resize(Config):
    """How an image becomes a square of ``image_size``; differentiable.

    An image that has ``image_size`` already counts as cropped and stays as it is, even where the source library would
    enlarge it and crop: perturbations are made at that size, and a crop would cut their edge off.
    """

    image_size: int  # side of the square image, in pixels
    interpolation: Interpolation = "bicubic"  # always antialiased
    resize_mode: ResizeMode = "squash"  # squash changes the aspect; shortest: shorter side, then a centre crop
    resize_size: int | None = None  # side before the centre is cropped, at least image_size; None: image_size
    centre: Literal["floor", "round"] = "floor"  # of odd margins: transformers floors, torchvision rounds

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < 1:
            raise ValueError(f"image_size: expected at least 1 pixel, got {self.image_size}")
        if max(self.image_size, self.resize_size or 1) > LARGEST_SIDE:
            largest = max(self.image_size, self.resize_size or 1)
            raise ValueError(f"image_size, resize_size: expected at most {LARGEST_SIDE} pixels, got {largest}")
        if (self.resize_size or self.image_size) < self.image_size:
            raise ValueError(
                f"resize_size: expected at least the image_size of {self.image_size} pixels, got {self.resize_size}"
            )

    def resize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, 3, image_size, image_size), still in [0, 1]; such an image stays as it is."""
        height, width = images.shape[-2:]
        if (height, width) == (self.image_size, self.image_size):
            return images
        side, shorter = self.resize_size or self.image_size, min(height, width)
        if not shorter:
            raise ValueError(f"images: expected at least 1 x 1 pixels, got {height} x {width}")
        target = [side, side]
        if self.resize_mode == "shortest":
            # in whole numbers: side * (height / width) may land just below the integer that the libraries reach
            target = [side * height // shorter, side * width // shorter]
        margins = [size - self.image_size for size in target]
        starts = [margin // 2 if self.centre == "floor" else round(margin / 2) for margin in margins]
        if self.resize_mode == "shortest" and max(height, width) > WIDEST * shorter:
            images, target, starts = self._crop_first(images, starts)
        images = F.interpolate(images, target, mode=self.interpolation, antialias=True, align_corners=False)
        top, left = starts
        images = images[..., top : top + self.image_size, left : left + self.image_size]
        return images.clamp(0, 1)  # bicubic overshoots

    def _crop_first(self, images: Tensor, starts: list[int]) -> tuple[Tensor, list[int], list[int]]:
        """The part of a thin image that its centre is made of, the size that it is resized to, and the crop's corner.

        The part is a whole number of squares of the shorter side, so that the crop stays where it was to half a pixel;
        beside it there are three squares for the filter.
        """
        shorter, side = min(images.shape[-2:]), self.resize_size or self.image_size
        axis = 0 if images.shape[-2] > shorter else 1
        first = starts[axis] // side - 3
        count = (starts[axis] + self.image_size - 1) // side + 4 - first
        images = images.narrow(axis - 2, first * shorter, count * shorter)
        target, moved = [side, side], list(starts)
        target[axis], moved[axis] = side * count, starts[axis] - first * side
        return images, target, moved

    @property
    def geometry(self) -> Resize:
        """This rule alone: encoders that differ only in mean and std have the same."""
        names = ("image_size", "interpolation", "resize_mode", "resize_size", "centre")
        return Resize(**{name: getattr(self, name) for name in names})

    def at(self, image_size: int | None) -> Resize:
        """The rule for images stored at another size, which the encoder enlarges or shrinks again; None: its own."""
        if image_size in (None, self.image_size):
            return self.geometry
        return Resize(
            image_size=image_size,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
            centre=self.centre,
        )


def as_resize(size: int | Resize) -> Resize:
    """A side in pixels as the rule that squashes to a square; a rule as it is."""
    return Resize(image_size=size) if isinstance(size, int) else size


def to_tensor(image: Any, size: int | Resize | None = None, max_pixels: int | None = None) -> Tensor:
    """A PIL image as (3, H, W) float32 in [0, 1].

    Args:
        image: of a mode that the module's text lists.
        size: None leaves the size; a side in pixels squashes to a square; a rule (an encoder's ``preprocess`` is one)
            is applied.
        max_pixels: width times height beyond which an image is refused before it is decoded; None: no limit.

    Raises:
        ValueError: no pixels, too many, or a mode that is not converted. OSError: a truncated file.
    """
    from PIL import ImageOps

    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"it has {width} x {height} pixels, more than the limit of {max_pixels:,}; shrink it, or raise max_pixels "
            "if you trust its source"
        )
    if width * height == 0:
        raise ValueError("it has no pixels")
    if image.format == "EPS":  # Pillow would start Ghostscript
        raise ValueError("its format is EPS, which is a program; convert it to PNG")
    sixteen_bit_png = image.format == "PNG" and image.mode == "I"  # of older versions of Pillow
    pixels = _levels(ImageOps.exif_transpose(image), sixteen_bit_png)
    return pixels if size is None else as_resize(size).resize(pixels[None])[0]


def _levels(image: Any, sixteen_bit: bool) -> Tensor:
    """(3, H, W) float32 in [0, 1] of a PIL image in its own size."""
    if image.mode.startswith("I;16") or sixteen_bit:
        grey = torch.from_numpy(np.asarray(image).astype(np.float32) / 65535)
        return grey.expand(3, -1, -1).contiguous()
    if image.mode == "F":
        grey = torch.from_numpy(np.array(image, dtype=np.float32))
        if not bool(((grey >= 0) & (grey <= 1)).all()):  # also for NaN, which compares false
            raise ValueError(
                f"its floats range from {float(grey.min()):.4g} to {float(grey.max()):.4g}; expected [0, 1]; scale "
                "them, or convert the image to 8 bits"
            )
        return grey.expand(3, -1, -1).contiguous()
    if image.mode.startswith("I"):
        raise ValueError(
            f"its mode is {image.mode!r}: integers of unknown range; convert it to 8 bits, or pass an array of floats "
            "in [0, 1]"
        )
    try:
        if image.mode in ("P", "PA", "LA", "La", "RGBa"):
            image = image.convert("RGBA")  # not all of them lead to RGB directly
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    except ValueError as error:
        raise ValueError(f"its mode {image.mode!r} cannot be converted to RGB ({error})") from error


def to_pil(image: Tensor) -> Any:
    """(3, H, W) in [0, 1] as a PIL image of 8 bits."""
    from PIL import Image

    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def read_image(
    file: Any, what: str, size: int | Resize | None = None, max_pixels: int = MAX_PIXELS, formats: Any = FORMATS
) -> Tensor:
    """An image file as (3, H, W) float32 in [0, 1].

    Args:
        file: a path or an open binary file.
        what: name of the image in error messages.
        size, max_pixels: as for :func:`to_tensor`.
        formats: formats of Pillow that are opened.

    Raises:
        ValueError: missing, truncated, of another format, too large, or of a mode that is not converted; names the
            image.
    """
    return _opened(file, what, formats, lambda image: to_tensor(image, size, max_pixels))


def check_image(file: Any, what: str, formats: Any = FORMATS) -> None:
    """Raise ValueError, as :func:`read_image`, for a file whose header is not that of an image."""
    _opened(file, what, formats, lambda image: None)


def _opened(file: Any, what: str, formats: Any, use: Callable[[Any], T]) -> T:
    """What ``use`` makes of the opened image. Raises ValueError, with ``what``, for everything that fails."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file, formats=formats) as image:
            return use(image)
    except UnidentifiedImageError as error:  # its message shows the memory address of the file object
        reason = f"expected one of the formats {', '.join(formats)}"
        if isinstance(file, str | os.PathLike) and not os.path.getsize(file):
            reason = "the file is empty"
        raise ValueError(f"{what} could not be read as an image: {reason}") from error
    except Exception as error:  # every plugin of Pillow has its own exceptions for damaged files
        reason = (
            (isinstance(error, OSError) and error.strerror) or without_addresses(str(error)) or type(error).__name__
        )
        raise ValueError(f"{what} could not be read as an image: {reason}") from error
