"""Perturbations that others published, as files of any of the usual kinds, replayed as :class:`Perturbation`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.perturbation import FORMAT, Perturbation
from zepad_mm.utils.io import read_tensors

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")


def load_published(
    path: str | Path,
    *,
    epsilon: float | None = None,
    norm: str = "linf",
    scale: float | None = None,
    image_size: int | None = None,
    key: str | None = None,
) -> Perturbation:
    """A perturbation file that nobody here wrote: ``.pt``, ``.pth``, ``.npy``, ``.npz`` or ``.safetensors``.

    Nothing in it is executed: torch files are read with ``weights_only=True``, numpy's without pickles.

    Args:
        path: holds (3, H, W), (1, 3, H, W), (H, W, 3) or (1, H, W, 3), alone or in a dictionary.
        epsilon: the budget to bring it into, by projection: what is beyond is cut, what is below stays as it is (for
            another pattern size use :meth:`Perturbation.rescaled`). None: the file's own length in ``norm`` is the
            budget. A patch needs it: its share of the area.
        norm: "linf", "l2" or "patch".
        scale: the value that one full pixel has in the file, 1 or 255. None: 255 where a value lies beyond 1 (for
            additive ones: no perturbation of pixels in [0, 1] does), 1 otherwise. State it for files in bytes so faint
            that no value exceeds 1.
        image_size: side that it is resized to now; None leaves it, and it is resized to the pictures it meets.
        key: which entry, where the file holds several.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, a shape that is no picture, NaN, several
        entries and no key, a patch without a budget.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a perturbation file there")
    if norm == "patch" and epsilon is None:
        raise ValueError("epsilon: a patch needs the share of the area that it may cover, e.g. epsilon=0.03")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected the value of one full pixel in the file, 1 or 255, got {scale}")
    raw = _layout(_pick(_read(path), key, path), path).double()
    if not bool(torch.isfinite(raw).all()):
        raise ValueError(f"{path} holds NaN or infinity; fetch it again")
    largest = float(raw.abs().max())
    if scale is None:
        scale = 255.0 if largest > 1 else 1.0
    if largest / scale > 1 + 1e-6:
        raise ValueError(f"{path} has values up to {largest:.4g}, more than one full pixel at scale {scale:g}")
    delta = (raw / scale).float()
    if image_size is not None and delta.shape[-2:] != (image_size, image_size):
        delta = F.interpolate(delta[None], (image_size, image_size), mode="bilinear", align_corners=False)[0]
    if epsilon is None:
        epsilon = float(delta.abs().max() if norm == "linf" else delta.double().norm())
    about = {"file": path.name, "scale": scale, "shape": list(raw.shape), "largest": largest / scale}
    return Perturbation.fit_budget(delta, epsilon, norm, about)


def _read(path: Path) -> Any:
    """What the file holds: a tensor, or a mapping of them."""
    kind = path.suffix.lower()
    try:
        if kind in TORCH_FILES:
            return torch.load(path, map_location="cpu", weights_only=True)
        if kind in (".npy", ".npz"):
            import numpy as np

            found = np.load(path, allow_pickle=False)
            if kind == ".npy":
                return torch.from_numpy(found)
            with found:
                return {name: torch.from_numpy(found[name]) for name in found.files}
    except Exception as error:  # readers raise whatever the damage makes of their parsers, UnpicklingError among it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} could not be read as plain tensors: {reason[:200]}; it is damaged or holds pickled objects, "
            "which are never executed here; save the bare tensor or array"
        ) from error
    if kind == ".safetensors":
        tensors, metadata = read_tensors(path)
        if metadata.get("format") == FORMAT:
            raise ValueError(f"{path} was written by zepad-mm; use Perturbation.load(path)")
        return tensors
    raise ValueError(f"{path}: expected a file that ends in .npy, .npz, .safetensors or one of {TORCH_FILES}")


def _pick(found: Any, key: str | None, path: Path) -> Tensor:
    """The one tensor that is meant."""
    if isinstance(found, Tensor) and key is None:
        return found
    names = (
        [str(name) for name, value in found.items() if isinstance(value, Tensor)] if isinstance(found, Mapping) else []
    )
    if key is None and len(names) == 1:
        key = names[0]
    if key not in names:
        wanted = "" if key is None else f" but no {key!r}"
        raise ValueError(f"{path} holds {names or type(found).__name__}{wanted}; name a tensor with key=")
    chosen: Tensor = found[key]
    return chosen


def _layout(raw: Tensor, path: Path) -> Tensor:
    """(3, H, W), wherever the colours were."""
    raw = raw.detach()
    picture = raw[0] if raw.ndim == 4 and len(raw) == 1 else raw
    if picture.ndim == 3 and picture.numel():
        if picture.shape[0] == 3:
            return picture
        if picture.shape[2] == 3:
            return picture.permute(2, 0, 1)
    raise ValueError(f"{path} holds {tuple(raw.shape)}; expected (3, H, W), (1, 3, H, W), (H, W, 3) or (1, H, W, 3)")
