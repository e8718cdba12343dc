"""Examples for a feature gate: features of clean, corrupted and attacked images, each encoded once and cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from zepad_mm.attacks import ATTACKS, FEATURE_LOSSES, PGD, UNIVERSAL_ATTACKS, Perturbation, UniversalAttack, frozen
from zepad_mm.attacks.gate_aware import GateAwarePGD
from zepad_mm.attacks.universal.base import PatchAttack
from zepad_mm.attacks.wrappers import Model
from zepad_mm.data.corruptions import SEVERITIES
from zepad_mm.encoders import Encoder
from zepad_mm.encoders.inference import optimize_for_inference
from zepad_mm.evaluation.stage_cache import StageCache
from zepad_mm.models.gate import FeatureGate
from zepad_mm.training.gate_images import Examples, ImagePool, corruption
from zepad_mm.training.gate_settings import GateSettings
from zepad_mm.utils.seeding import derived_generator, derived_seed, seeded_generator

CLASSES = (5, 200)  # fewest and most of an attack on a margin
REFERENCES = 512  # images whose features stand for classes, where attackers know another encoder
BACKWARD = 3  # passes that a forward and a backward pass together cost
GATE_WEIGHTS = (0.02, 1.0)  # lowest and highest weight of the gate's score in a gate-aware attack


class ExampleMaker:
    """Corrupts, attacks and encodes images.

    Args:
        benign: encoder whose weight the gate sets, (B, 3, H, W) to (B, D).
        robust: the other encoders.
        public: encoder that attackers know; None: the benign one.
        directions: (K, D) class embeddings for attacks on margins; None: those of other images and random ones.
        cache: keeps finished stages and batches; None: nothing is kept.
    """

    def __init__(
        self,
        benign: Encoder,
        robust: Sequence[Encoder],
        pool: ImagePool,
        settings: GateSettings,
        *,
        public: Encoder | None = None,
        directions: Tensor | None = None,
        cache: StageCache | None = None,
        progress: tqdm | None = None,
    ) -> None:
        self.pool, self.settings, self.cache, self.progress = pool, settings, cache, progress
        parameter = next(benign.parameters())
        self.device = parameter.device
        self.benign, *self.robust = (optimize_for_inference(one, pool.image_size) for one in (benign, *robust))
        self.public = self.benign if public is None else optimize_for_inference(public, pool.image_size)
        self.directions = directions
        self.widths = tuple(encoder.feature_dim for encoder in (benign, *robust))
        self.reference: Tensor  # (M, D) clean public features, of the images at the sorted rows (M,)
        self.reference_rows: Tensor

    def encode(self, images: Tensor) -> Tensor:
        """(B, D) features of all encoders side by side, in float32 on the CPU."""
        with torch.no_grad():
            features = [self._features(encoder, images) for encoder in (self.benign, *self.robust)]
        return torch.cat(features, 1).cpu()

    def _features(self, encoder: nn.Module, images: Tensor) -> Tensor:
        parameter = next(encoder.parameters())
        return encoder(images.to(parameter.device, parameter.dtype)).float()

    def _stage(
        self,
        name: str,
        rows: Tensor,
        size: int,
        make: Callable[[Tensor, torch.Generator, int], Tensor],
        cost: int = 0,
    ) -> Tensor:
        """Features (n, D) of ``make(images, generator, number)`` in batches of ``size``, read where they are there.

        Args:
            cost: passes of an image through the encoders that an attack takes; its batches are kept one by one.
        """
        found = None if self.cache is None else self.cache.read(name)
        if found is not None and len(found["features"]) == len(rows):
            self._advance(len(rows) * (cost or 1), name)
            return found["features"]
        parts = []
        for number, batch in enumerate(rows.split(size)):

            def work(batch: Tensor = batch, number: int = number) -> Tensor:
                generator = derived_generator(self.settings.seed, "gate", name, number)
                images = self.pool.fetch(batch).to(self.device)
                return self.encode(make(images, generator, number))

            parts.append(self.cache.batch(name, number, work) if cost and self.cache is not None else work())
            self._advance(len(batch) * (cost or 1), name)
        features = torch.cat(parts)
        if self.cache is not None:
            self.cache.write(name, {"features": features})
        return features

    def _advance(self, images: int, name: str) -> None:
        if self.progress is not None:
            self.progress.set_description(f"training the gate, {name}", refresh=False)
            self.progress.update(images)

    # ---- unattacked images -----------------------------------------------------------------------------------

    def clean(self, rows: Tensor) -> Examples:
        """The images as they are; sets the reference features."""
        size = self.settings.encode_batch_size
        features = self._stage("clean", rows, size, lambda images, *_: images)
        if self.public is self.benign:
            self.reference, self.reference_rows = features[:, : self.widths[0]], rows
        else:
            self.reference_rows = rows[:: -(-len(rows) // REFERENCES)]
            images = self.pool.fetch(self.reference_rows)
            with torch.no_grad():
                parts = [self._features(self.public, batch.to(self.device)).cpu() for batch in images.split(size)]
            self.reference = torch.cat(parts)
        return Examples("clean", "", False, features, rows)

    def corrupted(self, rows: Tensor, kind: str, names: Sequence[str] = ()) -> Examples:
        """Each image with one corruption of ``names`` or, without any, of all; it changes every few images."""
        names = names or self.settings.corruptions

        def make(images: Tensor, generator: torch.Generator, number: int) -> Tensor:
            done = []
            for few in images.split(8):
                name = names[int(torch.randint(len(names), (1,), generator=generator))]
                severity = SEVERITIES[int(torch.randint(len(SEVERITIES), (1,), generator=generator))]
                done.append(corruption(name)(few, severity, generator))
            return torch.cat(done)

        features = self._stage(f"corrupted {kind}", rows, self.settings.encode_batch_size, make)
        return Examples("corrupted", kind, False, features, rows)

    # ---- one perturbation for all images ---------------------------------------------------------------------

    def perturbation(self, name: str, rows: Tensor) -> Perturbation:
        """The perturbation of a registered universal attack, made on the public encoder on images at ``rows``."""
        path = None if self.cache is None else Path(self.cache.folder) / f"perturbation-{name}.safetensors"
        self._advance(crafting_passes(name, self.settings), name)
        if path is not None and path.is_file():
            return Perturbation.load(path)
        attack, images = self._universal_attack(name), self.pool.fetch(rows)
        with self._autocast():
            perturbation = attack.fit(self.public, images.to(self.device))
        if path is not None:
            perturbation.save(path)
        return perturbation

    def _universal_attack(self, name: str) -> UniversalAttack:
        settings, kind = self.settings, UNIVERSAL_ATTACKS.get(name)
        attack = kind(image_size=self.pool.image_size, seed=derived_seed(settings.seed, "gate", name) % 2**31)
        if not issubclass(kind, PatchAttack):
            attack = replace(attack, epsilon=min(settings.universal_budgets[1], 10 / 255))
        batch = max(settings.universal_batch_size, attack.min_images)
        return replace(attack, batch_size=batch, steps=settings.universal_steps or attack.steps)

    def universal(
        self, perturbations: Mapping[str, Perturbation], rows: Tensor, kind: str, group: str = "universal"
    ) -> Examples:
        """Each image with one of the perturbations, rescaled to a budget that changes every few images."""
        names, (low, high) = list(perturbations), self.settings.universal_budgets

        def make(images: Tensor, generator: torch.Generator, number: int) -> Tensor:
            done = []
            for few in images.split(8):
                chosen = perturbations[names[int(torch.randint(len(names), (1,), generator=generator))]]
                if chosen.norm != "patch":
                    chosen = chosen.rescaled(low + (high - low) * float(torch.rand(1, generator=generator)))
                done.append(chosen(few, generator=generator))
            return torch.cat(done)

        features = self._stage(f"universal {kind}", rows, self.settings.encode_batch_size, make)
        return Examples(group, kind, True, features, rows)

    # ---- one perturbation for each image ---------------------------------------------------------------------

    def per_image(self, rows: Tensor, kind: str, names: Sequence[str]) -> Examples:
        """Each batch attacked on the public encoder by one of the attacks ``names``; budgets differ between batches."""
        settings, size = self.settings, self.settings.attack_batch_size
        budgets = spread(
            settings.per_image_budgets, -(-len(rows) // size), derived_seed(settings.seed, "budgets", kind)
        )

        def make(images: Tensor, generator: torch.Generator, number: int) -> Tensor:
            name, _, loss = names[number % len(names)].partition(":")
            options: dict[str, Any] = {"epsilon": budgets[number], "steps": settings.per_image_steps, "loss": loss}
            model: Model = partial(self._features, self.public)
            with self._autocast(), _all_frozen((self.public,)):
                if loss in FEATURE_LOSSES:
                    return ATTACKS.get(name)(**options)(model, images, generator=generator)
                head, labels = self._pseudo_classes(images, generator)
                options["stop_when_wrong"] = False
                attack = ATTACKS.get(name)(**options)
                return attack(lambda images: head(model(images)), images, labels, generator=generator)

        features = self._stage(f"per-image {kind}", rows, size, make, BACKWARD * settings.per_image_steps)
        return self._changed(Examples("per_image", kind, True, features, rows))

    def stopped(self, rows: Tensor, kind: str) -> Examples:
        """Each image attacked on the margin of the public encoder until the answer is wrong, and no further.

        Such an attack moves the features least. All count, since the smallest move is enough to change the answer.
        """
        settings, size = self.settings, self.settings.attack_batch_size
        seed = derived_seed(settings.seed, "budgets", "stopped", kind)
        budgets = spread(settings.per_image_budgets, -(-len(rows) // size), seed)

        def make(images: Tensor, generator: torch.Generator, number: int) -> Tensor:
            attack = PGD(epsilon=budgets[number], steps=settings.per_image_steps)
            with self._autocast(), _all_frozen((self.public,)):
                head, labels = self._pseudo_classes(images, generator)
                model: Model = partial(self._features, self.public)
                return attack(lambda images: head(model(images)), images, labels, generator=generator)

        features = self._stage(f"stopped {kind}", rows, size, make, BACKWARD * settings.per_image_steps)
        return Examples("stopped", kind, True, features, rows)

    def gate_aware(self, gate: FeatureGate, rows: Tensor, kind: str) -> Examples:
        """Each image attacked on the public encoder while the gate's score is kept low.

        The gate must be the same when the stage is resumed.
        """
        settings, size = self.settings, self.settings.attack_batch_size
        budgets = spread(settings.round_budgets, -(-len(rows) // size), derived_seed(settings.seed, "budgets", kind))
        weights = spread(GATE_WEIGHTS, len(budgets), derived_seed(settings.seed, "weights", kind))
        gate = gate.to(self.device)

        def scored(images: Tensor, heads: Callable[[Tensor], Tensor] | None = None) -> Tensor:
            benign = self._features(self.benign, images)
            score = gate(benign, [self._features(encoder, images) for encoder in self.robust])
            moved = benign if self.public is self.benign else self._features(self.public, images)
            return torch.cat([moved if heads is None else heads(moved), score.float()[:, None]], 1)

        def make(images: Tensor, generator: torch.Generator, number: int) -> Tensor:
            attack = GateAwarePGD(epsilon=budgets[number], steps=settings.round_steps, gate_weight=weights[number])
            with self._autocast(), _all_frozen((self.benign, *self.robust, self.public, gate)):
                if number % 2:
                    heads, labels = self._pseudo_classes(images, generator)
                    return attack(partial(scored, heads=heads), images, labels, generator=generator)
                return attack(scored, images, generator=generator)

        features = self._stage(f"gate-aware {kind}", rows, size, make, 2 * BACKWARD * settings.round_steps)
        return self._changed(Examples("gate_aware", kind, True, features, rows))

    def _changed(self, examples: Examples) -> Examples:
        """Those whose public features moved: an attack that moves nothing does no harm, and is no example."""
        if self.public is not self.benign or self.reference is None:
            return examples
        order = torch.searchsorted(self.reference_rows, examples.rows)
        width = self.reference.shape[1]
        change = 1 - F.cosine_similarity(examples.features[:, :width], self.reference[order], dim=-1)
        return examples.select(change >= self.settings.least_change)

    def _pseudo_classes(self, images: Tensor, generator: torch.Generator) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """A head of random classes on public features, and its answers on ``images`` (B,), which serve as labels.

        Classes are drawn from the class embeddings if there are some, else they are the features of other images and
        random mixtures of features, in turn.
        """
        known, mean = self.reference, self.reference.mean(0)
        draw = float(torch.rand(1, generator=generator))
        low, high = CLASSES
        count = round(low * (high / low) ** float(torch.rand(1, generator=generator)))
        if self.directions is not None and draw < 0.5:
            centre = torch.zeros_like(mean)
            classes = self.directions[torch.randperm(len(self.directions), generator=generator)[:count]].cpu()
        elif draw < 0.75:
            centre, classes = mean, known[torch.randint(len(known), (count,), generator=generator)] - mean
        else:
            mixed = torch.randn(count, len(known), generator=generator)
            centre, classes = mean, mixed @ (known - mean)  # as spread out as the features are
        centre, classes = centre.to(self.device), F.normalize(classes.float(), dim=-1).to(self.device)

        def head(features: Tensor) -> Tensor:
            return F.normalize(features - centre, dim=-1) @ classes.T

        with torch.no_grad():
            return head, head(self._features(self.public, images)).argmax(-1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.mixed_precision == "bf16")


def crafting_passes(name: str, settings: GateSettings) -> int:
    """How many passes of an image through the public encoder a universal attack takes."""
    steps = settings.universal_steps or UNIVERSAL_ATTACKS.get(name)().steps
    return BACKWARD * steps * settings.universal_batch_size


def spread(bounds: Sequence[float], count: int, seed: int) -> list[float]:
    """``count`` values between two bounds, one in each of as many equal parts of their ratio, in random order."""
    low, high = bounds
    generator = seeded_generator(seed)
    parts = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / max(1, count)
    return [low * (high / low) ** float(part) for part in parts]


@contextmanager
def _all_frozen(models: Sequence[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(frozen(model))
        yield
