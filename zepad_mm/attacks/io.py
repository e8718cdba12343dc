"""Files: adversarial images as lossless PNG, and perturbation files that others published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.base import check_levels
from zepad_mm.attacks.perturbation import FORMAT as PERTURBATION_FORMAT
from zepad_mm.attacks.perturbation import Perturbation
from zepad_mm.utils.atomic import complete_folder, replacing_folder
from zepad_mm.utils.images import read_image
from zepad_mm.utils.io import check_not_inflated, read_json, read_tensors, write_json
from zepad_mm.utils.validation import check_images, check_labels

ADVERSARIAL_FORMAT = "zepad-mm adversarial images 1"
ADVERSARIAL_FILE = "adversarial.json"
Fit = Literal["resize", "crop", "tile"]  # how a perturbation is brought to the size of the images
Restore = Literal["original", "rescale", "sign"]  # its length afterwards
TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, eq=False)
class AdversarialImages:
    """Adversarial images read by :func:`load_adversarial`.

    Attributes:
        images: (B, 3, H, W) float32, multiples of 1 / 255, exactly as saved.
        labels: (B,) true classes, or None.
        about: metadata saved with them.
    """

    images: Tensor
    labels: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def save_adversarial(
    folder: str | Path, images: Tensor, labels: Tensor | None = None, about: Mapping[str, Any] | None = None
) -> None:
    """Write ``000000.png`` and so on and ``adversarial.json``; the folder has all of them at once, or none.

    Args:
        folder: created if missing; must hold no other adversarial images.
        images: (B, 3, H, W) in [0, 1], multiples of 1 / 255: made with ``quantize=True``.
        labels: (B,) true classes.
        about: attack, budget, model; JSON-able.

    Raises:
        ValueError: images that an 8-bit PNG would change. FileExistsError: the folder holds adversarial images already.
    """
    from PIL import Image

    check_levels(check_images(images))
    labels = None if labels is None else check_labels(labels, images)
    folder = Path(folder)
    complete_folder(folder)
    if (folder / ADVERSARIAL_FILE).exists():
        raise FileExistsError(f"{folder} holds adversarial images already; give another folder, or delete it")
    note = {
        "format": ADVERSARIAL_FORMAT,
        "n": len(images),
        "labels": None if labels is None else labels.tolist(),
        "about": dict(about or {}),
    }
    with replacing_folder(folder) as staged:
        for index, levels in enumerate((images.detach() * 255).round().byte().cpu()):
            Image.fromarray(levels.permute(1, 2, 0).numpy()).save(staged / _image_name(index), format="PNG")
        write_json(staged / ADVERSARIAL_FILE, note)


def load_adversarial(folder: str | Path) -> AdversarialImages:
    """Read what :func:`save_adversarial` wrote.

    Raises:
        FileNotFoundError: the folder is incomplete, or an image is missing. ValueError: an unknown format or a damaged
            image.
    """
    folder = Path(folder)
    complete_folder(folder)
    note_path = folder / ADVERSARIAL_FILE
    if not note_path.is_file():
        raise FileNotFoundError(f"{note_path} does not exist; expected a folder by save_adversarial")
    note = read_json(note_path)
    if not isinstance(note, dict) or note.get("format") != ADVERSARIAL_FORMAT:
        raise ValueError(f"{note_path} does not describe adversarial images of zepad-mm: {str(note)[:200]}")
    n, labels, about = _check_note(note, note_path)
    images: list[Tensor] = []
    for index in range(n):
        path = folder / _image_name(index)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {note_path} announces {n} images")
        images.append(read_image(path, str(path), formats=("PNG",)))
        if images[-1].shape != images[0].shape:
            (height, width), (first_height, first_width) = images[-1].shape[1:], images[0].shape[1:]
            raise ValueError(
                f"{path} has {width} x {height} pixels; the first image has {first_width} x {first_height}"
            )
    return AdversarialImages(torch.stack(images) if images else torch.empty(0, 3, 1, 1), labels, about)


def _check_note(note: dict[str, Any], path: Path) -> tuple[int, Tensor | None, dict[str, Any]]:
    """Number of images, labels and metadata. Raises ValueError for other types, or labels that are not one for each."""
    n, labels, about = note.get("n"), note.get("labels"), note.get("about") or {}
    if type(n) is not int or n < 0 or not isinstance(about, dict):
        raise ValueError(
            f"{path}: expected the number of images as 'n' and a dictionary as 'about', got {str(note)[:200]}"
        )
    if labels is None:
        return n, None, about
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 2**31 for label in labels):
        raise ValueError(f"{path}: expected 'labels' to be a list of class indices, got {str(labels)[:200]}")
    if len(labels) != n:
        raise ValueError(f"{path}: expected a label for each of the {n} images, got {len(labels)} labels")
    return n, torch.tensor(labels, dtype=torch.long), about


def _image_name(index: int) -> str:
    return f"{index:06d}.png"


def load_published(
    path: str | Path,
    *,
    epsilon: float | None = None,
    norm: str = "linf",
    scale: float | None = None,
    image_size: int | None = None,
    key: str | None = None,
    fit: Fit = "resize",
    restore: Restore = "original",
) -> Perturbation:
    """A perturbation from a file of another project: ``.pt``, ``.npy``, ``.npz``, ``.mat`` or ``.safetensors``.

    No code in the file is run: torch files are read with ``weights_only=True``, numpy files without pickles, and of
    MATLAB files the numeric arrays alone. :func:`published_variants` returns what else an attacker would try.

    Args:
        path: holds (3, H, W), (1, 3, H, W), (H, W, 3) or (1, H, W, 3), alone or in a dictionary.
        epsilon: budget that the perturbation is projected into. None: the budget is the file's own length in ``norm``.
            Required for a patch: its share of the area.
        norm: "linf", "l2" or "patch".
        scale: value of a full pixel in the file, 1 or 255. None: 255 if any value exceeds 1, otherwise 1. Set it for
            files in bytes whose values are all at most 1.
        image_size: side that it is brought to now; None: it is resized to the images when applied.
        key: name of the tensor, where the file holds several.
        fit: how it is brought to ``image_size``: "resize" (bilinear); "crop" the centre of a larger one; "tile" copies
            of a smaller one.
        restore: its length afterwards: "original", as in the file and at most ``epsilon``, although resizing averages
            pixels; "rescale" to all of ``epsilon``; "sign": plus or minus ``epsilon`` in each pixel.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown kind of file, a shape that is not an image's, NaN, several tensors and no key, a patch
            without a budget, or a fit that its size does not allow.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a perturbation file there")
    if norm == "patch" and epsilon is None:
        raise ValueError("epsilon: a patch needs the share of the area that it may cover, e.g. epsilon=0.03")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected the value of one full pixel in the file, 1 or 255, got {scale}")
    for name, value, known in (("fit", fit, get_args(Fit)), ("restore", restore, get_args(Restore))):
        if value not in known or (norm == "patch" and value != known[0]):
            raise ValueError(f"{name}: expected one of {', '.join(known)} (of a patch the first), got {value!r}")
    raw = _channels_first(_select_tensor(_read_tensors(path), key, path), path).double()
    if not bool(torch.isfinite(raw).all()):
        raise ValueError(f"{path} holds NaN or infinity; fetch it again")
    largest = float(raw.abs().max())
    if scale is None:
        scale = 255.0 if largest > 1 else 1.0
    if largest / scale > 1 + 1e-6:
        raise ValueError(f"{path} has values up to {largest:.4g}, more than one full pixel at scale {scale:g}")
    delta = (raw / scale).float()
    if epsilon is None:
        epsilon = _length(delta, norm)
    about = {"file": path.name, "scale": scale, "shape": list(raw.shape), "largest": largest / scale}
    about |= {"fit": fit, "restore": restore}
    if image_size is not None:
        fitted = _fitted(delta, image_size, fit, path)
        averaged = fit == "resize" and norm != "patch"  # which shrinks it
        delta = fitted * (_length(delta, norm) / max(_length(fitted, norm), 1e-12)) if averaged else fitted
    if restore == "rescale":
        delta = delta * (epsilon / max(_length(delta, norm), 1e-12))
    elif restore == "sign":
        delta = delta.sign() * epsilon
    return Perturbation.fit_budget(delta, epsilon, norm, about)


def published_variants(
    path: str | Path, *, epsilon: float, image_size: int, scale: float | None = None, key: str | None = None
) -> list[Perturbation]:
    """What an attacker makes of a file in the L-inf budget: each fit that its size allows, with each restored length.

    Arguments and errors as for :func:`load_published`. The first is what that returns by default.
    """
    height, width = load_published(path, scale=scale, key=key).delta.shape[-2:]
    fits: list[Fit] = ["resize"]
    if min(height, width) >= image_size and (height, width) != (image_size, image_size):
        fits.append("crop")
    elif min(height, width) < image_size:
        fits.append("tile")
    options: dict[str, Any] = {"epsilon": epsilon, "image_size": image_size, "scale": scale, "key": key}
    return [load_published(path, fit=fit, restore=restore, **options) for fit in fits for restore in get_args(Restore)]


def _length(delta: Tensor, norm: str) -> float:
    return float(delta.abs().max() if norm == "linf" else delta.double().norm())


def _fitted(delta: Tensor, size: int, fit: Fit, path: Path) -> Tensor:
    """(3, H, W) to (3, size, size)."""
    height, width = delta.shape[-2:]
    if (height, width) == (size, size):
        return delta
    if fit == "resize":
        return F.interpolate(delta[None], (size, size), mode="bilinear", align_corners=False)[0]
    if fit == "tile":
        copies = (1, -(-size // height), -(-size // width))
        return delta.repeat(copies)[:, :size, :size]
    if min(height, width) < size:
        raise ValueError(f"{path} has {height} x {width} pixels, fewer than {size} x {size}; write fit='tile'")
    top, left = (height - size) // 2, (width - size) // 2
    return delta[:, top : top + size, left : left + size]


def _read_tensors(path: Path) -> Any:
    """The content of the file: a tensor, or a mapping of tensors."""
    kind = path.suffix.lower()
    check_not_inflated(path)
    try:
        if kind in TORCH_FILES:
            return torch.load(path, map_location="cpu", weights_only=True)
        if kind in (".npy", ".npz"):
            import numpy as np

            content = np.load(path, allow_pickle=False)
            if kind == ".npy":
                return torch.from_numpy(content)
            with content:
                return {name: torch.from_numpy(content[name]) for name in content.files}
        if kind == ".mat":
            return _matlab_arrays(path)
    except Exception as error:  # damaged files raise many kinds of errors, UnpicklingError among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} could not be read as plain tensors: {reason[:200]}; it is damaged or holds pickled objects, "
            "which are never executed here; save the bare tensor or array"
        ) from error
    if kind == ".safetensors":
        tensors, metadata = read_tensors(path)
        if metadata.get("format") == PERTURBATION_FORMAT:
            raise ValueError(f"{path} was written by zepad-mm; use Perturbation.load(path)")
        return tensors
    endings = ", ".join((".npy", ".npz", ".mat", ".safetensors", *TORCH_FILES))
    raise ValueError(f"{path}: expected a file that ends in one of {endings}")


def _matlab_arrays(path: Path) -> dict[str, Tensor]:
    """The numeric arrays of a MATLAB file up to version 7; structures, cells, functions and objects are left out."""
    import numpy as np
    from scipy.io import loadmat

    content = loadmat(str(path), appendmat=False, struct_as_record=True, verify_compressed_data_integrity=True)
    return {
        name: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64))
        for name, value in content.items()
        if not name.startswith("__") and isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
    }


def _select_tensor(content: Any, key: str | None, path: Path) -> Tensor:
    """The only tensor, or the one named ``key``."""
    if isinstance(content, Tensor) and key is None:
        return content
    names = (
        [str(name) for name, value in content.items() if isinstance(value, Tensor)]
        if isinstance(content, Mapping)
        else []
    )
    if key is None and len(names) == 1:
        key = names[0]
    if key not in names:
        wanted = "" if key is None else f" but no {key!r}"
        raise ValueError(f"{path} holds {names or type(content).__name__}{wanted}; name a tensor with key=")
    chosen: Tensor = content[key]
    return chosen


def _channels_first(raw: Tensor, path: Path) -> Tensor:
    """The tensor as (3, H, W)."""
    raw = raw.detach()
    image = raw[0] if raw.ndim == 4 and len(raw) == 1 else raw
    if image.ndim == 3 and image.numel():
        if image.shape[0] == 3:
            return image
        if image.shape[2] == 3:
            return image.permute(2, 0, 1)
    raise ValueError(f"{path} holds {tuple(raw.shape)}; expected (3, H, W), (1, 3, H, W), (H, W, 3) or (1, H, W, 3)")
