"""A universal perturbation with its budget and provenance, for images of any size; patches, whose budget is an area."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zepad_mm.attacks.base import check_budget, check_generator, project, resize_delta
from zepad_mm.utils.hub import Access, card_text, fetch, push_folder
from zepad_mm.utils.io import parse_metadata, read_tensors, write_tensors, write_text
from zepad_mm.utils.text import budget_text
from zepad_mm.utils.validation import check_images

PLACES = ("center", "lower_right", "random")


def check_place(place: str) -> str:
    """The place. Raises ValueError unless it is one of ``PLACES``."""
    if place not in PLACES:
        raise ValueError(f"place: expected one of {PLACES}, got {place!r}")
    return place


def patch_size(size: tuple[int, int], area: float) -> tuple[int, int]:
    """(h, w) of a patch on an image of ``size`` (H, W): the same aspect ratio, at most ``area`` of the pixels."""
    side = math.sqrt(area)
    return int(size[0] * side + 1e-9), int(size[1] * side + 1e-9)  # 1e-9: 0.1 * 10 may come out below 1


def paste(
    images: Tensor, patch: Tensor, area: float, place: str = "lower_right", generator: torch.Generator | None = None
) -> Tensor:
    """Images with the patch pasted on them; differentiable in both.

    Args:
        images: (B, 3, H, W) in [0, 1].
        patch: (3, h, w) in [0, 1]; resized to the size that ``area`` allows.
        area: largest share of the pixels to replace, in [0, 1]; nothing is replaced below one pixel.
        place: "center"; "lower_right", as AdvEncoder and AdvCLIP do; or "random", drawn for each image.
        generator: CPU generator of the random places; seed 0 when None.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    height, width = images.shape[-2:]
    rows, columns = patch_size((height, width), area)
    if rows == 0 or columns == 0:
        return images + 0 * patch.sum()  # keeps the patch in the graph, for attacks that take its gradient
    if patch.shape[-2:] != (rows, columns):
        patch = F.interpolate(patch[None], (rows, columns), mode="bilinear", align_corners=False)[0]
    adversarial = images.clone()
    if check_place(place) != "random":
        free = (height - rows, width - columns)
        top, left = free if place == "lower_right" else (free[0] // 2, free[1] // 2)
        adversarial[..., top : top + rows, left : left + columns] = patch
        return adversarial
    generator = check_generator(generator)
    tops = torch.randint(height - rows + 1, (len(images),), generator=generator).tolist()
    lefts = torch.randint(width - columns + 1, (len(images),), generator=generator).tolist()
    for index, (top, left) in enumerate(zip(tops, lefts, strict=True)):
        adversarial[index, :, top : top + rows, left : left + columns] = patch
    return adversarial


FORMAT = "zepad-mm perturbation 1"
FILE = "perturbation.safetensors"  # file name in a Hub repository


@dataclass(frozen=True, eq=False, repr=False)
class Perturbation:
    """One perturbation for every image.

    Attributes:
        delta: (3, H, W) float32 on the CPU, inside the budget: added to images, or the pixels of a patch in [0, 1].
        epsilon: budget in pixels of [0, 1]; for a patch the share of the area that it may cover.
        norm: "linf", "l2" or "patch".
        provenance: how it was crafted: attack, encoders, data, seed, steps. JSON-able.
        place: position of a patch: "center", "lower_right" or "random" (per image); unused by additive ones.
    """

    delta: Tensor
    epsilon: float
    norm: str = "linf"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    place: str = "lower_right"

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.norm)
        check_place(self.place)
        if self.delta.ndim != 3 or self.delta.shape[0] != 3 or self.delta.numel() == 0:
            raise ValueError(f"perturbation: expected delta of shape (3, H, W), got {tuple(self.delta.shape)}")
        if not torch.isfinite(self.delta).all():
            raise ValueError("perturbation: delta holds NaN or infinity")
        object.__setattr__(self, "delta", self.delta.detach().float().cpu().clone())
        object.__setattr__(self, "provenance", dict(self.provenance))
        if self.norm == "patch":
            low, high = (float(bound) for bound in self.delta.aminmax())
            if low < 0 or high > 1:
                raise ValueError(
                    f"perturbation: a patch holds pixels in [0, 1], got values from {low:.4g} to {high:.4g}; "
                    "write delta / 255 for bytes, or Perturbation.fit_budget(delta, area, 'patch')"
                )
            return
        length = float(self.delta.abs().max() if self.norm == "linf" else self.delta.double().norm())
        if length > self.epsilon + 1e-6 * max(1.0, self.epsilon):
            raise ValueError(
                f"perturbation: delta has {self.norm} length {length:.4g}, beyond its budget of {self.epsilon:.4g}; "
                "use Perturbation.fit_budget(delta, epsilon) to project it"
            )

    @classmethod
    def fit_budget(
        cls, delta: Tensor, epsilon: float, norm: str = "linf", provenance: Mapping[str, Any] | None = None
    ) -> Perturbation:
        """A perturbation from a delta of any length, projected (never scaled up) into ``epsilon``."""
        check_budget(epsilon, norm)
        return cls(project(delta.detach().float().cpu(), epsilon, norm), epsilon, norm, provenance or {})

    def rescaled(self, epsilon: float) -> Perturbation:
        """The same pattern at another budget: delta * epsilon / own epsilon; a patch keeps its pixels."""
        if self.epsilon == 0:
            raise ValueError("perturbation: a budget of 0 has no pattern to rescale")
        note = {**self.provenance, "rescaled_from": self.epsilon}
        if self.norm == "patch":
            return Perturbation(self.delta, epsilon, self.norm, note, self.place)
        return Perturbation.fit_budget(self.delta * (epsilon / self.epsilon), epsilon, self.norm, note)

    def __call__(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images in [0, 1]; the delta is resized to the images and projected into its budget again.

        Args:
            generator: draws the positions of a patch with place "random"; seed 0 when None. Otherwise unused.
        """
        images = check_images(images)
        if self.norm == "patch":
            return paste(images, self.delta.to(images), self.epsilon, self.place, generator)
        delta = resize_delta(self.delta, (images.shape[-2], images.shape[-1]), self.epsilon, self.norm)
        return (images + delta.to(images)).clamp(0, 1)

    def __repr__(self) -> str:
        size = f"{self.delta.shape[-2]}x{self.delta.shape[-1]}"
        return f"Perturbation({size}, epsilon={self.epsilon:.6g}, norm={self.norm!r}, {dict(self.provenance)})"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the budget and the provenance in its metadata."""
        about: dict[str, Any] = {"epsilon": self.epsilon, "norm": self.norm, "provenance": dict(self.provenance)}
        if self.norm == "patch":
            about["place"] = self.place
        try:
            text = json.dumps(about, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance: expected plain JSON values, got {self.provenance}: {error}") from error
        write_tensors(path, {"delta": self.delta}, {"format": FORMAT, "perturbation": text})

    @classmethod
    def load(cls, path: str | Path, epsilon: float | None = None) -> Perturbation:
        """A perturbation saved by :meth:`save`.

        Args:
            epsilon: expected budget; a file with another budget is an error, since results would not be comparable.

        Raises:
            ValueError: a damaged file, an unknown format, or another budget.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT or "delta" not in tensors:
            raise ValueError(
                f"{path} is not a perturbation of zepad-mm: it holds {sorted(tensors)} and {metadata}"[:300]
            )
        try:
            about = parse_metadata(metadata, "perturbation", path)
            place = {"place": about["place"]} if "place" in about else {}
            loaded = cls(tensors["delta"], about["epsilon"], about["norm"], about["provenance"], **place)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{path} is a damaged perturbation file: {reason:.300}; fetch or craft it again"
            ) from error
        if epsilon is not None and abs(loaded.epsilon - epsilon) > 1e-9:
            given, expected = (budget_text(value, loaded.norm) for value in (loaded.epsilon, epsilon))
            raise ValueError(
                f"{path} was made for epsilon {given}, expected {expected}; "
                "use Perturbation.load(path).rescaled(epsilon) to rescale it"
            )
        return loaded

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, branch: str | None = None
    ) -> str:
        """Publish it with a card, see :func:`zepad_mm.utils.hub.push_folder`; returns the URL of the commit."""
        with TemporaryDirectory() as folder:
            self.save(Path(folder) / FILE)
            write_text(Path(folder) / "README.md", self._card(repo_id))
            return push_folder(
                folder, repo_id, private=private, token=token, branch=branch, message="Upload a perturbation"
            )

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        epsilon: float | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Perturbation:
        """A perturbation from the Hub; ``epsilon`` as for :meth:`load`, the rest as for ``hub.fetch``."""
        access = Access(
            token=token, cache_dir=cache_dir, local_files_only=local_files_only, force_download=force_download
        )
        folder = fetch(repo_id, [FILE], required=[FILE], revision=revision, access=access)
        return cls.load(folder / FILE, epsilon)

    def _card(self, repo_id: str) -> str:
        budget = f"{self.epsilon:.4g} of the area" if self.norm == "patch" else f"{self.epsilon * 255:.4g}/255"
        made = "\n".join(f"| {key} | `{value}` |" for key, value in self.provenance.items())
        body = f"""\
# A universal adversarial perturbation

One perturbation of {self.delta.shape[-2]} x {self.delta.shape[-1]} pixels for every image: {self.norm}, budget
{budget}. It is for testing defences. Provenance:

| | |
|---|---|
{made}

```python
from zepad_mm.attacks import Perturbation

adversarial = Perturbation.from_hub("{repo_id}")(images)  # images (B, 3, H, W) in [0, 1]
```
"""
        return card_text(body, tags=["adversarial-perturbation", "adversarial-robustness", "zepad"])
