"""Anything that is a picture to pixels in [0, 1], and nothing that is none."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zepad_mm.data import to_tensor
from zepad_mm.utils.validation import check_images

MAX_PIXELS = 89_478_485  # where Pillow, too, begins to warn of decompression bombs
MAX_BYTES = 64 * 2**20  # of a picture behind a URL
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no format that starts another program
KNOWN = "a PIL picture, path, URL, bytes, open file, array or tensor"


def as_many(images: Any) -> tuple[bool, Iterable[Any]]:
    """(whether it was a single image, an iterable of images). Raises ValueError for what is neither."""
    if isinstance(images, Tensor):
        single = images.ndim == 3
        pixels = _as_float(images[None] if single else images)
        return single, list(check_images(pixels))
    if isinstance(images, np.ndarray):
        return images.ndim < 4, [images] if images.ndim < 4 else list(images)
    if isinstance(images, str | bytes | bytearray | os.PathLike) or hasattr(images, "convert") or _is_file(images):
        return True, [images]
    if isinstance(images, dict) or not isinstance(images, Iterable):
        raise ValueError(f"images: expected {KNOWN}, or several of them, got {type(images).__name__}")
    return False, images


def pixels_of(image: Any, max_pixels: int = MAX_PIXELS) -> Tensor:
    """One picture as (3, H, W) float32 in [0, 1].

    Args:
        image: a PIL picture, path, URL, the bytes of a file, an open binary file, a uint8 or [0, 1] array of shape
            (H, W, 3), (3, H, W) or (H, W), or a (3, H, W) tensor.
        max_pixels: width times height beyond which a file is not decoded.

    Raises:
        ValueError: no picture, a truncated one, too many pixels, NaN, or other channels than grey, RGB, palette or
            RGB with alpha (which is dropped).
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if isinstance(image, Tensor):
        pixels = check_images(_as_float(image)[None])[0]
        if pixels.numel() == 0:
            raise ValueError(f"images: {tuple(pixels.shape)} has no pixels")
        return pixels
    if hasattr(image, "convert"):
        return _decoded(image, "the picture", max_pixels)
    if isinstance(image, bytes | bytearray):
        return _read(io.BytesIO(image), f"{len(image)} bytes", max_pixels)
    if _is_file(image):
        return _read(image, repr(getattr(image, "name", "the file")), max_pixels)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return _read(io.BytesIO(_fetched(image)), repr(image), max_pixels)
    if isinstance(image, str | os.PathLike):
        return _read(Path(image), repr(str(image)), max_pixels)
    raise ValueError(f"expected {KNOWN}, got {type(image).__name__}")


def _is_file(image: Any) -> bool:
    return callable(getattr(image, "read", None))


def _as_float(pixels: Tensor) -> Tensor:
    """Bytes to [0, 1]; other integers are left to the check that refuses them."""
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    return pixels.float() if pixels.is_floating_point() else pixels


def _from_array(array: np.ndarray) -> Tensor:
    """Colour last, as Pillow and OpenCV have it, or first; grey without a colour axis."""
    if array.dtype.kind not in "fu":
        raise ValueError(f"images: expected an array of uint8 or of floats in [0, 1], got {array.dtype}")
    if array.ndim == 2:
        array = np.stack([array] * 3)
    elif array.ndim == 3 and array.shape[-1] in (1, 3):
        array = np.broadcast_to(array, (*array.shape[:2], 3)).transpose(2, 0, 1)
    elif array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(
            f"images: expected an array of shape (H, W, 3), (3, H, W) or (H, W), got {array.shape}; "
            "drop alpha with array[..., :3]"
        )
    if array.dtype.kind == "u" and array.dtype != np.uint8:
        raise ValueError(f"images: expected 8-bit levels, got {array.dtype}; write array / {np.iinfo(array.dtype).max}")
    return torch.from_numpy(np.array(array, order="C"))


def _read(file: Any, what: str, max_pixels: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as picture:
            return _decoded(picture, what, max_pixels)
    except _RefusedError:
        raise
    except Exception as error:  # every plugin of Pillow has its own for damaged files
        raise ValueError(f"{what} could not be read as a picture: {error}") from error


class _RefusedError(ValueError):
    """A picture that could be read, and is not taken."""


def _decoded(picture: Any, what: str, max_pixels: int) -> Tensor:
    from PIL import ImageOps

    width, height = picture.size
    if width * height > max_pixels:
        raise _RefusedError(
            f"{what} has {width} x {height} pixels, more than the {max_pixels:,} that are taken; shrink it, or raise "
            "max_pixels if you trust where it comes from"
        )
    if width * height == 0:
        raise _RefusedError(f"{what} has no pixels")
    if picture.mode.startswith(("I", "F")):  # Pillow would clip them to white
        raise _RefusedError(
            f"{what} has more than 8 bits per channel (mode {picture.mode!r}); bring it to 8 first, or hand in an "
            "array of floats in [0, 1]"
        )
    try:
        return to_tensor(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError) as error:  # Pillow decodes late: here a truncated file shows
        raise ValueError(f"{what} could not be read as a picture: {error}") from error


def _fetched(url: str) -> bytes:
    """What is behind a URL, up to a limit."""
    from http.client import HTTPException
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=30) as response:
            found: bytes = response.read(MAX_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(f"{url!r} could not be read as a picture: {error or type(error).__name__}") from error
    if len(found) > MAX_BYTES:
        raise ValueError(f"{url!r} is larger than {MAX_BYTES // 2**20} MB; fetch it and hand in the file")
    return found
