"""Classification and attacks behind the page and the endpoint."""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zepad_mm.attacks import PGD, FeatureUAP, Perturbation
from zepad_mm.attacks.base import round_within_budget
from zepad_mm.classifier import RobustZeroShotClassifier, pixels_of
from zepad_mm.classifier.classifier import Task
from zepad_mm.data import load_data
from zepad_mm.encoders import Preprocess
from zepad_mm.evaluation.white_box import fused_attack
from zepad_mm.models.config import Policy
from zepad_mm.serve.limits import RequestLimiter
from zepad_mm.serve.settings import MAX_LEVELS, ServeSettings
from zepad_mm.utils.images import to_pil
from zepad_mm.utils.io import ASSETS
from zepad_mm.utils.text import printable, quoted, without_addresses

SHIPPED = ASSETS / "perturbation" / "embedded.safetensors"
SHIPPED_FOR = "open_clip:embedded"
LONGEST_ERROR = 400  # characters
ATTACKS = {
    "universal": "one perturbation for all images, made on the public encoder (T1)",
    "public": "made for this image, on the public encoder",
    "white_box": "made for this image, through the whole defence with its gate: momentum PGD on the fused margin (T2)",
}
WHITE_BOX_LOSS = "fused_margin"  # plain PGD leaves answers that this attack takes through a gate


@dataclass(frozen=True)
class Attacked:
    """An image before and after an attack.

    Attributes:
        clean, attacked: (3, S, S) in [0, 1], in whole levels k / 255, at the size that the public encoder sees.
        before, after: answers of the classifier to each, with the evidence.
        label: the label that the attack moves away from.
        warnings: what the library says of the labels, e.g. that one is cut off.
    """

    clean: Tensor
    attacked: Tensor
    before: dict[str, Any]
    after: dict[str, Any]
    label: str
    warnings: tuple[str, ...] = ()


class Service:
    """A classifier behind limits. Thread-safe.

    Args:
        classifier: its parameters no longer require gradients.
        settings: the limits.
        perturbation: of the attack "universal"; None takes the shipped one, or crafts one on first use.
    """

    def __init__(
        self,
        classifier: RobustZeroShotClassifier,
        settings: ServeSettings | None = None,
        perturbation: Perturbation | None = None,
    ) -> None:
        self.classifier = classifier
        self.settings = settings or ServeSettings()
        self.limiter = RequestLimiter(self.settings.workers, self.settings.queue)
        self._perturbation = perturbation
        self._crafting = threading.Lock()
        self._recording = threading.Lock()  # recorded warnings are those of the process
        classifier.max_pixels = self.settings.max_pixels
        # attacks switch requires_grad of parameters off and on, which is not thread-safe
        classifier.model.requires_grad_(False)
        classifier.model.undefended.requires_grad_(False)

    def classify(
        self,
        image: Any,
        labels: Sequence[str],
        template: str = "photo",
        *,
        top_k: int | None = None,
        evidence: bool = False,
        on_adversarial: str = "ignore",
        policy: Policy | None = None,
    ) -> Any:
        """Classify an image, as the classifier. Raises ValueError for bad input, BusyError when the queue is full."""
        with self.limiter.slot():
            return self.classifier(
                image,
                self._checked(labels, template),
                hypothesis_template=template,
                top_k=top_k,
                return_evidence=evidence,
                on_adversarial=on_adversarial,
                policy=policy,
            )

    def attack(
        self,
        image: Any,
        labels: Sequence[str],
        template: str = "photo",
        *,
        attack: str = "universal",
        levels: int = 8,
        label: str | None = None,
        policy: Policy | None = None,
    ) -> Attacked:
        """Attack an image and classify it before and after.

        Args:
            image: as for the classifier.
            labels: at least two.
            template: prompt set or template.
            attack: a name of :data:`ATTACKS`.
            levels: L-inf budget in levels of 255, 0 to 16.
            label: true label; None takes the answer of the attacked model to the clean image.
            policy: as for the classifier.

        Raises:
            ValueError: bad input; BusyError: the queue is full.
        """
        if attack not in ATTACKS:
            raise ValueError(f"attack: expected one of {', '.join(ATTACKS)}, got {quoted(attack)}")
        if not 0 <= levels <= MAX_LEVELS:
            raise ValueError(f"epsilon: expected 0 to {MAX_LEVELS} levels of 255, got {levels}")
        names = self._checked(labels, template)
        if len(names) < 2:
            raise ValueError("labels: an attack needs at least two labels")
        if label is not None and label not in names:
            raise ValueError(f"label: expected one of {quoted(list(names))}, got {quoted(label)}")
        with self.limiter.slot():
            task, messages = self._task(names, template, policy)
            pixels = pixels_of(image, self.settings.max_pixels)
            clean = (self._geometry.resize(pixels[None]) * 255).round() / 255
            clean = clean.to(self.classifier.model.device)
            white_box = attack == "white_box"
            target = task.defended if white_box else task.undefended
            with torch.no_grad():
                away = names.index(label) if label is not None else int(target(clean).argmax())
            epsilon = levels / 255
            if attack == "universal":
                moved = self.perturbation.rescaled(epsilon)(clean)
                attacked = round_within_budget(clean, moved, epsilon, "linf")
            else:
                steps, label_index = self.settings.attack_steps, torch.tensor([away], device=clean.device)
                if white_box:
                    fused = fused_attack(WHITE_BOX_LOSS, task.fuse, steps, epsilon=epsilon, quantize=True)
                    attacked = fused(task.branch_logits, clean, label_index)
                else:
                    attacked = PGD(epsilon=epsilon, steps=steps, quantize=True)(target, clean, label_index)
            both = torch.cat([clean, attacked])
            before, after = self.classifier(
                both, names, hypothesis_template=template, return_evidence=True, policy=policy
            )
        return Attacked(clean[0].cpu(), attacked[0].cpu(), before, after, names[away], messages)

    def _task(self, names: list[str], template: str, policy: Policy | None) -> tuple[Task, tuple[str, ...]]:
        """The classifier's task, and what the library warns of."""
        with self._recording, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            task = self.classifier.task(names, template, policy)
        return task, tuple(str(one.message) for one in caught)

    @property
    def perturbation(self) -> Perturbation:
        """Perturbation of the attack "universal", before it is rescaled to the requested budget."""
        with self._crafting:
            if self._perturbation is None:
                public = self.classifier.model.config.public_source
                if public == SHIPPED_FOR and SHIPPED.is_file():
                    self._perturbation = Perturbation.load(SHIPPED)
                else:
                    size = self._geometry.image_size
                    surrogate = load_data("embedded", "surrogate", size, 128)
                    craft = FeatureUAP(epsilon=10 / 255, image_size=size, steps=60, batch_size=16)
                    self._perturbation = craft.fit(self.classifier.model.undefended.encoder, surrogate.images)
            return self._perturbation

    @property
    def _geometry(self) -> Preprocess:
        return self.classifier.model.undefended.encoder.preprocess

    def _checked(self, labels: Sequence[str], template: str) -> list[str]:
        most, longest = self.settings.max_labels, self.settings.max_label_length
        if len(labels) > most:
            raise ValueError(f"labels: expected at most {most}, got {len(labels)}")
        for text, what in ((template, "template"), *((label, "labels") for label in labels)):
            if len(text) > longest:
                raise ValueError(f"{what}: expected at most {longest} characters, got {len(text)}: {text[:20]!r}...")
        return list(labels)


def error_text(error: Exception | str) -> str:
    """The message of an error or a warning for a client: printable, bounded, without memory addresses."""
    text = printable(without_addresses(str(error)))
    return text if len(text) <= LONGEST_ERROR else f"{text[: LONGEST_ERROR - 3]}..."


def png(image: Tensor) -> bytes:
    """Encode (3, H, W) in [0, 1] as PNG bytes."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    return file.getvalue()
