"""Student and defence as the one module that is wrapped for many processes."""

from __future__ import annotations

from torch import Tensor, nn

from zepad_mm.defences.base import Batch, Defence, Student


class Objective(nn.Module):
    """Student and defence as one module: whatever forwards the defence makes, the distributed wrapper sees one."""

    def __init__(self, student: Student, defence: Defence) -> None:
        super().__init__()
        self.student = student
        self.defence = defence

    def forward(
        self, images: Tensor, labels: Tensor, indices: Tensor, original: Tensor | None, attacked: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one share of a batch, and its parts."""
        loss = self.defence.loss(self.student, Batch(images, labels, indices, original), attacked)
        return loss.total, loss.parts
