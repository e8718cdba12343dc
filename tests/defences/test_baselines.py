"""TRADES, MART and PMG-AFT: their losses equal the formulas of the papers, and so do their gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor, nn

from zepad_mm.defences import MART, PMGAFT, TRADES, Batch, Defence

Formula = Callable[[np.ndarray, np.ndarray, np.ndarray], float]
LABELS = np.arange(8) % 4


class Table(nn.Module):
    """A student whose logits are parameters: the adversarial rows, then the clean ones; its head is the identity."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.attacked = nn.Parameter(2 * torch.randn(8, 4, generator=draw))
        self.clean = nn.Parameter(2 * torch.randn(8, 4, generator=draw))
        self.head = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert len(images) == 16
        rows = torch.cat([self.attacked, self.clean])
        return rows, rows


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(1)


def ce(p: np.ndarray) -> float:
    return float(-np.log(p[np.arange(8), LABELS]).mean())


def trades(adversarial: np.ndarray, clean: np.ndarray, original: np.ndarray) -> float:
    return ce(clean) + 6 * kl(clean, adversarial).mean()


def mart(adversarial: np.ndarray, clean: np.ndarray, original: np.ndarray) -> float:
    wrong = [max(p for k, p in enumerate(row) if k != y) for row, y in zip(adversarial, LABELS, strict=True)]
    boosted = ce(adversarial) - np.log(1 - np.array(wrong)).mean()
    return boosted + 5 * (kl(clean, adversarial) * (1 - clean[np.arange(8), LABELS])).mean()


def pmg_aft(adversarial: np.ndarray, clean: np.ndarray, original: np.ndarray) -> float:
    return ce(adversarial) + 0.5 * kl(original, adversarial).mean() + 2 * kl(clean, adversarial).mean()


@pytest.mark.parametrize(
    ("defence", "formula", "moves_clean"),
    [(TRADES(), trades, True), (MART(), mart, True), (PMGAFT(general_weight=0.5, clean_weight=2.0), pmg_aft, False)],
    ids=lambda value: getattr(value, "name", None),
)
def test_baseline_losses_equal_their_formulas(defence: Defence, formula: Formula, moves_clean: bool) -> None:
    student = Table()
    original = torch.randn(8, 4, generator=torch.Generator().manual_seed(7)).requires_grad_(True)
    images = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    batch = Batch(images, torch.from_numpy(LABELS), torch.arange(8), original)
    total = defence.loss(student, batch, images).total  # type: ignore[arg-type]
    sides = (side.detach().double().numpy() for side in (student.attacked, student.clean, original))
    assert float(total.detach()) == pytest.approx(formula(*(softmax(side, axis=1) for side in sides)), rel=1e-4)
    total.backward()
    assert float(student.attacked.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert bool(student.clean.grad.abs().sum() > 0) == moves_clean  # type: ignore[union-attr]
    assert original.grad is None


def test_bad_values_raise_errors_that_name_the_field() -> None:
    with pytest.raises(ValueError, match="no gradient at"):
        TRADES(random_start=False)
    with pytest.raises(ValueError, match="beta"):
        TRADES(beta=-1.0)
    with pytest.raises(ValueError, match="kl_weight"):
        MART(kl_weight=-1.0)
    with pytest.raises(ValueError, match="clean_weight"):
        PMGAFT(clean_weight=-1.0)
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="original"):
        PMGAFT().loss(Table(), Batch(images, torch.zeros(2).long(), torch.arange(2)), images)  # type: ignore[arg-type]
