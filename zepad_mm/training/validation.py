"""Accuracy on held-out images, clean and under PGD, exact for every number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from zepad_mm.attacks import PGD
from zepad_mm.attacks.base import frozen
from zepad_mm.data import LabelledImages
from zepad_mm.defences.base import Student
from zepad_mm.utils.config import Config
from zepad_mm.utils.seeding import seeded_generator


@dataclass(frozen=True, kw_only=True)
class Validation(Config):
    """Accuracies in [0, 1] on ``n`` images. A few PGD steps select a checkpoint only; no robustness evaluation."""

    clean: float
    robust: float
    n: int
    epsilon: float
    attack_steps: int

    def score(self, selection: str) -> float:
        """What checkpoints are ordered by; 0 for "last", where the later one wins."""
        return {"mean": (self.clean + self.robust) / 2, "clean": self.clean, "robust": self.robust, "last": 0.0}[
            selection
        ]


def validate(
    student: Student,
    data: LabelledImages,
    accelerator: Accelerator | None = None,
    *,
    epsilon: float = 4 / 255,
    attack_steps: int = 5,
    batch_size: int = 256,
    view: Callable[[Tensor], Tensor] | None = None,
) -> Validation:
    """Clean and robust accuracy. Each image is scored by one process; the counts are added up, nothing is padded.

    Args:
        epsilon: L-inf budget of the attack; 0 skips it.
        attack_steps: 1 is FGSM without a random start.
        view: what the attack is shown, where that is not ``student.logits``.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(student.encoder.parameters()).device
    attack = PGD(
        epsilon=epsilon,
        loss="ce",
        steps=attack_steps,
        step_size=epsilon if attack_steps == 1 and epsilon else None,
        random_start=attack_steps > 1,
        stop_when_wrong=view is None,
    )
    counts = torch.zeros(2, device=device)
    with frozen(student):
        share = torch.arange(len(data))[rank::world]
        for number, index in enumerate(share.split(batch_size) if len(share) else ()):  # with few images, none
            images, labels = data.images[index].to(device), data.labels[index].to(device)
            correct = _correct(student, images, labels)
            counts[0] += correct.sum()
            if epsilon > 0 and bool(correct.any()):
                # an image that is wrong already counts as wrong: no step is spent on it
                images, labels = images[correct], labels[correct]
                generator = seeded_generator(rank + world * number)
                attacked = attack(view or student.logits, images, labels, generator=generator)
                correct = _correct(student, attacked, labels)
            counts[1] += correct.sum()
    if accelerator is not None and world > 1:
        counts = accelerator.reduce(counts, "sum")  # type: ignore[assignment]
    clean, robust = (float(count) / len(data) for count in counts)
    return Validation(clean=clean, robust=robust, n=len(data), epsilon=epsilon, attack_steps=attack_steps)


@torch.no_grad()
def _correct(student: Student, images: Tensor, labels: Tensor) -> Tensor:
    return student.logits(images).argmax(-1) == labels
