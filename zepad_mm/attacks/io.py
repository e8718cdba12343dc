"""Files: adversarial images as lossless PNG, and perturbation files that others published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.base import check_levels
from zepad_mm.attacks.perturbation import FORMAT as PERTURBATION_FORMAT
from zepad_mm.attacks.perturbation import Perturbation
from zepad_mm.utils.io import read_json, read_tensors, replacing, write_json
from zepad_mm.utils.validation import check_images, check_labels

ADVERSARIAL_FORMAT = "zepad-mm adversarial images 1"
ADVERSARIAL_FILE = "adversarial.json"
TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, eq=False)
class AdversarialImages:
    """What :func:`load_adversarial` reads.

    Attributes:
        images: (B, 3, H, W) float32, whole levels k / 255: bit for bit what was saved.
        labels: (B,) true classes, or None.
        about: what was noted with them.
    """

    images: Tensor
    labels: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def save_adversarial(
    folder: str | Path, images: Tensor, labels: Tensor | None = None, about: Mapping[str, Any] | None = None
) -> None:
    """Write ``000000.png`` and so on, and last ``adversarial.json``, without which the folder counts as unfinished.

    Args:
        folder: made if missing; must hold no other images.
        images: (B, 3, H, W) in [0, 1], of whole levels: made with ``quantize=True``.
        labels: (B,) true classes.
        about: attack, budget, model; JSON-able.

    Raises:
        ValueError: images that PNG would change; FileExistsError: the folder holds attacked images already.
    """
    from PIL import Image

    check_levels(check_images(images))
    labels = None if labels is None else check_labels(labels, images)
    folder = Path(folder)
    if (folder / ADVERSARIAL_FILE).exists():
        raise FileExistsError(f"{folder} holds attacked images already; give another folder, or delete it")
    for index, levels in enumerate((images.detach() * 255).round().byte().cpu()):
        with replacing(folder / _image_name(index)) as temporary:
            Image.fromarray(levels.permute(1, 2, 0).numpy()).save(temporary, format="PNG")
    note = {
        "format": ADVERSARIAL_FORMAT,
        "n": len(images),
        "labels": None if labels is None else labels.tolist(),
        "about": dict(about or {}),
    }
    write_json(folder / ADVERSARIAL_FILE, note)


def load_adversarial(folder: str | Path) -> AdversarialImages:
    """Read what :func:`save_adversarial` wrote.

    Raises:
        FileNotFoundError: not a finished folder, or an image is missing; ValueError: a foreign note or image.
    """
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms.functional import pil_to_tensor

    folder = Path(folder)
    if not (folder / ADVERSARIAL_FILE).is_file():
        raise FileNotFoundError(f"{folder / 'attacked.json'} does not exist; expected a folder by save_adversarial")
    note = read_json(folder / ADVERSARIAL_FILE)
    if not isinstance(note, dict) or note.get("format") != ADVERSARIAL_FORMAT:
        raise ValueError(f"{folder / 'attacked.json'} is no note of zepad-mm on attacked images: {str(note)[:200]}")
    images = []
    for index in range(note["n"]):
        try:
            with Image.open(folder / _image_name(index)) as image:
                images.append(pil_to_tensor(image.convert("RGB")).float() / 255)
        except (UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(f"{folder / _image_name(index)} is no complete PNG; save the images again") from error
    labels = None if note["labels"] is None else torch.tensor(note["labels"], dtype=torch.long)
    return AdversarialImages(torch.stack(images) if images else torch.empty(0, 3, 1, 1), labels, note["about"])


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
        image_size: side that it is resized to now; None leaves it, and it is resized to the images it meets.
        key: which entry, where the file holds several.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file, a shape that is no image, NaN, several
        entries and no key, a patch without a budget.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a perturbation file there")
    if norm == "patch" and epsilon is None:
        raise ValueError("epsilon: a patch needs the share of the area that it may cover, e.g. epsilon=0.03")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected the value of one full pixel in the file, 1 or 255, got {scale}")
    raw = _channels_first(_select_tensor(_read_tensors(path), key, path), path).double()
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


def _read_tensors(path: Path) -> Any:
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
        if metadata.get("format") == PERTURBATION_FORMAT:
            raise ValueError(f"{path} was written by zepad-mm; use Perturbation.load(path)")
        return tensors
    raise ValueError(f"{path}: expected a file that ends in .npy, .npz, .safetensors or one of {TORCH_FILES}")


def _select_tensor(found: Any, key: str | None, path: Path) -> Tensor:
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


def _channels_first(raw: Tensor, path: Path) -> Tensor:
    """(3, H, W), wherever the colours were."""
    raw = raw.detach()
    image = raw[0] if raw.ndim == 4 and len(raw) == 1 else raw
    if image.ndim == 3 and image.numel():
        if image.shape[0] == 3:
            return image
        if image.shape[2] == 3:
            return image.permute(2, 0, 1)
    raise ValueError(f"{path} holds {tuple(raw.shape)}; expected (3, H, W), (1, 3, H, W), (H, W, 3) or (1, H, W, 3)")
