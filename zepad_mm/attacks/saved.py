"""Attacked pictures as files that anybody can score again: lossless PNG and a note of what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zepad_mm.attacks.base import check_levels
from zepad_mm.utils.io import read_json, replacing, write_json
from zepad_mm.utils.validation import check_images, check_labels

FORMAT = "zepad-mm attacked pictures 1"


@dataclass(frozen=True, eq=False)
class Attacked:
    """What :func:`load_attacked` reads.

    Attributes:
        images: (B, 3, H, W) float32, whole levels k / 255: bit for bit what was saved.
        labels: (B,) true classes, or None.
        about: what was noted with them.
    """

    images: Tensor
    labels: Tensor | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def save_attacked(
    folder: str | Path, images: Tensor, labels: Tensor | None = None, about: Mapping[str, Any] | None = None
) -> None:
    """Write ``000000.png`` and so on, and last ``attacked.json``, without which the folder counts as unfinished.

    Args:
        folder: made if missing; must hold no other pictures.
        images: (B, 3, H, W) in [0, 1], of whole levels: made with ``quantize=True``.
        labels: (B,) true classes.
        about: attack, budget, model; JSON-able.

    Raises:
        ValueError: pictures that PNG would change; FileExistsError: the folder holds attacked pictures already.
    """
    from PIL import Image

    check_levels(check_images(images))
    labels = None if labels is None else check_labels(labels, images)
    folder = Path(folder)
    if (folder / "attacked.json").exists():
        raise FileExistsError(f"{folder} holds attacked pictures already; give another folder, or delete it")
    for index, levels in enumerate((images.detach() * 255).round().byte().cpu()):
        with replacing(folder / _name(index)) as temporary:
            Image.fromarray(levels.permute(1, 2, 0).numpy()).save(temporary, format="PNG")
    note = {
        "format": FORMAT,
        "n": len(images),
        "labels": None if labels is None else labels.tolist(),
        "about": dict(about or {}),
    }
    write_json(folder / "attacked.json", note)


def load_attacked(folder: str | Path) -> Attacked:
    """Read what :func:`save_attacked` wrote.

    Raises:
        FileNotFoundError: not a finished folder, or a picture is missing; ValueError: a foreign note or picture.
    """
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms.functional import pil_to_tensor

    folder = Path(folder)
    if not (folder / "attacked.json").is_file():
        raise FileNotFoundError(f"{folder / 'attacked.json'} does not exist; expected a folder by save_attacked")
    note = read_json(folder / "attacked.json")
    if not isinstance(note, dict) or note.get("format") != FORMAT:
        raise ValueError(f"{folder / 'attacked.json'} is no note of zepad-mm on attacked pictures: {str(note)[:200]}")
    pictures = []
    for index in range(note["n"]):
        try:
            with Image.open(folder / _name(index)) as picture:
                pictures.append(pil_to_tensor(picture.convert("RGB")).float() / 255)
        except (UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(f"{folder / _name(index)} is no complete PNG; save the pictures again") from error
    labels = None if note["labels"] is None else torch.tensor(note["labels"], dtype=torch.long)
    return Attacked(torch.stack(pictures) if pictures else torch.empty(0, 3, 1, 1), labels, note["about"])


def _name(index: int) -> str:
    return f"{index:06d}.png"
