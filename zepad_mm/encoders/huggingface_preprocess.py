"""The image processor of a transformers model, as our differentiable :class:`Preprocess`."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from zepad_mm.encoders.base import Preprocess
from zepad_mm.utils.images import Interpolation
from zepad_mm.utils.registry import shorten

log = logging.getLogger(__name__)

BILINEAR, BICUBIC = 2, 3  # PIL's codes, used in the configs
CLOSE = 1e-3  # normalised pixels; rounding differs by less, another interpolation by far more


def preprocess_of(processor: Any, config: Any, source: str) -> Preprocess:
    """The processor's steps, differentiable; a warning is logged where the two differ on a fixed image.

    Args:
        processor: from ``AutoImageProcessor``.
        config: of the vision model, for its ``image_size`` where the processor resizes nothing.
        source: for the messages.

    Raises:
        ValueError: the model does not take square images.
    """
    about = processor.to_dict()
    preprocess = Preprocess(**_sizes(about, config, source), **_statistics(about), interpolation=_filter(about, source))
    gap = _disagreement(processor, about, preprocess)
    if gap > CLOSE:
        log.warning(
            "%s: our preprocessing and %s differ by %.3g on a fixed image of 60 x 48 pixels (%s)",
            source,
            type(processor).__name__,
            gap,
            preprocess,
        )
    return preprocess


def _sizes(about: dict[str, Any], config: Any, source: str) -> dict[str, Any]:
    """Fields of Preprocess that make an image square."""
    if about.get("max_num_patches"):
        side = math.isqrt(about["max_num_patches"]) * about["patch_size"]
        return {"image_size": side, "resize_mode": "squash"}
    size = about.get("size") or {}
    shortest = size.get("shortest_edge")
    if not about.get("do_resize", True):
        own = getattr(config, "image_size", None)
        side = _square({"height": own, "width": own} if isinstance(own, int) else {}, source)
        return {"image_size": side, "resize_mode": "squash"}
    if about.get("crop_pct") and shortest:
        if shortest >= 384:  # ConvNeXt's rule: large images are squashed, small ones cropped
            return {"image_size": shortest, "resize_mode": "squash"}
        return {"image_size": shortest, "resize_mode": "shortest", "resize_size": int(shortest / about["crop_pct"])}
    if shortest:
        side = _square(about["crop_size"], source) if about.get("do_center_crop") else shortest
        return {"image_size": side, "resize_mode": "shortest", "resize_size": shortest}
    resized = _square(size, source)
    side = _square(about["crop_size"], source) if about.get("do_center_crop") else resized
    return {"image_size": side, "resize_mode": "squash", "resize_size": resized}


def _square(size: dict[str, Any], source: str) -> int:
    height, width = size.get("height"), size.get("width")
    if not isinstance(height, int) or height != width:
        raise ValueError(
            f"{source} wants images of {shorten(height)} x {shorten(width)} pixels; only square ones are supported"
        )
    return height


def _statistics(about: dict[str, Any]) -> dict[str, Any]:
    """Mean and std for pixels in [0, 1], whatever range the processor scales them to."""
    mean, std = (about.get(key) or default for key, default in (("image_mean", 0.0), ("image_std", 1.0)))
    if not about.get("do_normalize", True):
        mean, std = 0.0, 1.0
    scale = 255 * about["rescale_factor"] if about.get("do_rescale", True) else 255
    mean, std = ([value] * 3 if isinstance(value, int | float) else value for value in (mean, std))
    return {"mean": tuple(value / scale for value in mean), "std": tuple(value / scale for value in std)}


def _filter(about: dict[str, Any], source: str) -> Interpolation:
    code = about.get("resample")
    code = BILINEAR if code is None else int(code)
    if code not in (BILINEAR, BICUBIC):
        log.warning("%s resizes with PIL's filter %d, which has no gradient in torch; bicubic is used", source, code)
    return "bilinear" if code == BILINEAR else "bicubic"


def _disagreement(processor: Any, about: dict[str, Any], preprocess: Preprocess) -> float:
    """Largest difference in normalised pixels on a smooth image, not square unless the processor cuts patches."""
    height, width = (48, 48) if about.get("max_num_patches") else (48, 60)
    rows, columns = torch.linspace(0, 6, height).view(-1, 1), torch.linspace(0, 6, width)
    image = torch.stack([(rows + shift).sin() * (columns - shift).cos() for shift in (0.0, 1.0, 2.0)]) * 0.3 + 0.5
    try:
        theirs = processor(images=[image * 255], return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, RuntimeError) as error:
        log.warning("%s could not be compared: %s", type(processor).__name__, error)
        return 0.0
    ours: Tensor = preprocess(image[None])
    if about.get("max_num_patches"):
        size, side = about["patch_size"], preprocess.image_size // about["patch_size"]
        ours = (
            ours.unflatten(2, (side, size))
            .unflatten(4, (side, size))
            .permute(0, 2, 4, 3, 5, 1)
            .flatten(3)
            .flatten(1, 2)
        )
        theirs = theirs[:, : side * side]
    return float((ours - theirs).abs().max()) if ours.shape == theirs.shape else math.inf
