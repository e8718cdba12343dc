"""A universal perturbation as an object: what it is, its budget, where it came from; applied to images of any size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zepad_mm.attacks.base import check_budget, fit_delta, project
from zepad_mm.checks import check_images
from zepad_mm.files import read_tensors, write_tensors

FORMAT = "zepad-mm perturbation 1"


@dataclass(frozen=True, eq=False, repr=False)
class Perturbation:
    """One perturbation for every image.

    Attributes:
        delta: (3, H, W) float32 on the CPU, inside the budget.
        epsilon: the budget in pixels of [0, 1].
        norm: "linf" or "l2".
        provenance: how it was made: attack, encoder, data, seed, steps. JSON-able.
    """

    delta: Tensor
    epsilon: float
    norm: str = "linf"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.norm)
        if self.delta.ndim != 3 or self.delta.shape[0] != 3 or self.delta.numel() == 0:
            raise ValueError(f"perturbation: expected delta of shape (3, H, W), got {tuple(self.delta.shape)}")
        if not torch.isfinite(self.delta).all():
            raise ValueError("perturbation: delta holds NaN or infinity")
        object.__setattr__(self, "delta", self.delta.detach().float().cpu().clone())
        object.__setattr__(self, "provenance", dict(self.provenance))
        length = float(self.delta.abs().max() if self.norm == "linf" else self.delta.double().norm())
        if length > self.epsilon + 1e-6 * max(1.0, self.epsilon):
            raise ValueError(
                f"perturbation: delta has {self.norm} length {length:.4g}, beyond its budget of {self.epsilon:.4g}; "
                "was it made for another budget? Use Perturbation.fit_budget(delta, epsilon)"
            )

    @classmethod
    def fit_budget(
        cls, delta: Tensor, epsilon: float, norm: str = "linf", provenance: Mapping[str, Any] | None = None
    ) -> Perturbation:
        """From a raw delta of any budget, projected (never scaled up) into ``epsilon``."""
        check_budget(epsilon, norm)
        return cls(project(delta.detach().float().cpu(), epsilon, norm), epsilon, norm, provenance or {})

    def rescaled(self, epsilon: float) -> Perturbation:
        """The same pattern at another budget: delta * epsilon / own epsilon."""
        if self.epsilon == 0:
            raise ValueError("perturbation: one of budget 0 has no pattern to rescale")
        note = {**self.provenance, "rescaled_from": self.epsilon}
        return Perturbation.fit_budget(self.delta * (epsilon / self.epsilon), epsilon, self.norm, note)

    def __call__(self, images: Tensor) -> Tensor:
        """Attacked images, clamped to [0, 1]; the delta is resized to them and projected into its budget again."""
        images = check_images(images)
        delta = fit_delta(self.delta, (images.shape[-2], images.shape[-1]), self.epsilon, self.norm)
        return (images + delta.to(images)).clamp(0, 1)

    def __repr__(self) -> str:
        size = f"{self.delta.shape[-2]}x{self.delta.shape[-1]}"
        return f"Perturbation({size}, epsilon={self.epsilon:.6g}, norm={self.norm!r}, {dict(self.provenance)})"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the budget and the provenance in its metadata."""
        about = {"epsilon": self.epsilon, "norm": self.norm, "provenance": dict(self.provenance)}
        try:
            text = json.dumps(about, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"provenance: expected plain JSON values, got {self.provenance}: {error}") from error
        write_tensors(path, {"delta": self.delta}, {"format": FORMAT, "perturbation": text})

    @classmethod
    def load(cls, path: str | Path, epsilon: float | None = None) -> Perturbation:
        """Read what :meth:`save` wrote.

        Args:
            epsilon: the budget that is expected; a file of another one is an error, since results would be mixed.

        Raises:
            ValueError: damaged or foreign file, or another budget.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT or "delta" not in tensors:
            raise ValueError(f"{path} is no perturbation of zepad-mm: it holds {sorted(tensors)} and {metadata}"[:300])
        try:
            about = json.loads(metadata["perturbation"])
            loaded = cls(tensors["delta"], about["epsilon"], about["norm"], about["provenance"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged perturbation file: {error!r}; fetch or craft it again") from error
        if epsilon is not None and abs(loaded.epsilon - epsilon) > 1e-9:
            raise ValueError(
                f"{path} was made for epsilon {loaded.epsilon * 255:.4g}/255, expected {epsilon * 255:.4g}/255; "
                "use Perturbation.load(path).rescaled(epsilon) if that is meant"
            )
        return loaded
