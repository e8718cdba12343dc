"""Convert supported image inputs to float tensors in [0, 1]."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zepad_mm import __version__
from zepad_mm.utils.images import MAX_PIXELS, read_image, to_tensor
from zepad_mm.utils.text import quoted, without_addresses
from zepad_mm.utils.validation import check_images

LONGEST_PATH = 300  # characters of a path in a message
FILES = str | bytes | bytearray | memoryview | os.PathLike  # a path, or the content of a file
MAX_BYTES = 64 * 2**20  # of an image behind a URL
SUPPORTED = "a PIL image, path, URL, bytes, open file, array or tensor"


def as_iterable(images: Any) -> tuple[bool, Iterable[Any]]:
    """(whether it was a single image, an iterable of images). Raises ValueError for what is neither."""
    if isinstance(images, Tensor):
        single = images.ndim == 3
        pixels = _as_float(images[None] if single else images)
        return single, list(check_images(pixels))
    if isinstance(images, np.ndarray):
        return images.ndim < 4, [images] if images.ndim < 4 else list(images)
    if isinstance(images, FILES) or hasattr(images, "convert") or _is_open_file(images):
        return True, [images]
    if isinstance(images, dict) or not isinstance(images, Iterable):
        raise ValueError(f"images: expected {SUPPORTED}, or several of them, got {type(images).__name__}")
    return False, images


def pixels_of(image: Any, max_pixels: int = MAX_PIXELS) -> Tensor:
    """One image as (3, H, W) float32 in [0, 1].

    Args:
        image: a PIL image, path, URL, the bytes of a file, an open binary file, a uint8 or [0, 1] array of shape
            (H, W, 3), (3, H, W) or (H, W), or a (3, H, W) tensor.
        max_pixels: width times height beyond which a file is not decoded.

    Raises:
        ValueError: not an image, a truncated one, too many pixels, NaN, or a mode that
            :mod:`zepad_mm.utils.images` does not convert.
    """
    if isinstance(image, np.ndarray):
        image = _array_to_tensor(image)
    if isinstance(image, Tensor):
        pixels = check_images(_as_float(image)[None])[0]
        if pixels.numel() == 0:
            raise ValueError(f"images: {tuple(pixels.shape)} has no pixels")
        return pixels
    if hasattr(image, "convert"):
        return _convert(image, max_pixels)
    if isinstance(image, bytes | bytearray | memoryview):
        return read_image(io.BytesIO(image), f"{len(image)} bytes", max_pixels=max_pixels)
    if _is_open_file(image):
        return read_image(image, _file_name(image), max_pixels=max_pixels)
    if isinstance(image, str) and _is_url(image):
        return read_image(io.BytesIO(_fetch(image)), quoted(image), max_pixels=max_pixels)
    if isinstance(image, str | os.PathLike):
        if str(image)[:5].lower() == "data:":
            raise ValueError(f"{quoted(str(image))}: data URLs are not read; pass the bytes, base64.b64decode(...)")
        return read_image(Path(image), quoted(str(image), LONGEST_PATH), max_pixels=max_pixels)
    raise ValueError(f"expected {SUPPORTED}, got {type(image).__name__}")


def _convert(image: Any, max_pixels: int) -> Tensor:
    try:
        return to_tensor(image, max_pixels=max_pixels)
    except Exception as error:  # Pillow decodes late: a truncated file fails here, with errors of each plugin's own
        raise ValueError(f"the image could not be read as an image: {without_addresses(str(error))}") from error


def _is_open_file(image: Any) -> bool:
    return callable(getattr(image, "read", None))


def _as_float(pixels: Tensor) -> Tensor:
    """uint8 scaled to [0, 1]; other integer types are left as they are, for ``check_images`` to refuse."""
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    return pixels.float() if pixels.is_floating_point() else pixels


def _array_to_tensor(array: np.ndarray) -> Tensor:
    """An array with the channels last, as in Pillow and OpenCV, or first, or without (grey) as a (3, H, W) tensor."""
    if array.dtype.kind not in "fu":
        raise ValueError(f"images: expected an array of uint8 or of floats in [0, 1], got {array.dtype}")
    if array.dtype.kind == "f":  # torch knows neither other byte orders nor other precisions
        array = array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32)
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


def _file_name(file: Any) -> str:
    name = getattr(file, "name", None)
    return repr(name) if isinstance(name, str) else "the file"


def _is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def _fetch(url: str) -> bytes:
    """The content of a URL, up to ``MAX_BYTES``."""
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(_encoded(url), headers={"User-Agent": f"zepad-mm/{__version__}"}), timeout=30) as response:
            content: bytes = response.read(MAX_BYTES + 1)
    except HTTPError as error:
        raise ValueError(
            f"{quoted(url)} could not be fetched: the server answered {error.code} {error.reason}"
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise ValueError(f"{quoted(url)} could not be fetched: {reason or type(error).__name__}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{quoted(url)} is larger than {MAX_BYTES // 2**20} MB; download it and pass the file")
    return content


def _encoded(url: str) -> str:
    """A URL as a browser sends it: spaces and letters beyond ASCII are percent-encoded, names of hosts by IDNA."""
    from urllib.parse import quote, urlsplit, urlunsplit

    parts = urlsplit(url.strip())
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = (quote(part, safe="/%:;=&?~+!$,'@()*[]|") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, host, path, query, ""))
