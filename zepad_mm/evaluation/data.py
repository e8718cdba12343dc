"""The three disjoint sets of pictures an evaluation needs, and where they come from."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from zepad_mm.data import LabelledImages, load_data
from zepad_mm.evaluation.settings import EvalSettings
from zepad_mm.utils.seeding import seeded_generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalData:
    """Pictures by purpose.

    Attributes:
        test: what is reported on; nothing is chosen on it.
        validation: clean pictures that fix detector thresholds.
        surrogate: the attacker's own pictures; their labels are not used.
    """

    test: LabelledImages
    validation: LabelledImages
    surrogate: LabelledImages

    @classmethod
    def load(cls, source: str, settings: EvalSettings) -> EvalData:
        """A data set by name. Raises FileNotFoundError when it is not there."""
        size, seed = settings.image_size, settings.seed
        test = load_data(source, settings.test_split, size, settings.n, seed)
        try:
            validation = load_data(source, settings.validation_split, size, settings.n_validation, seed)
            surrogate = load_data(source, settings.surrogate_split, size, settings.n_surrogate, seed)
        except (FileNotFoundError, ValueError) as error:
            log.info("%s; drawing validation and surrogate pictures from 'train'", error)
            wanted = None
            if settings.n_validation is not None and settings.n_surrogate is not None:
                wanted = settings.n_validation + settings.n_surrogate
            train = load_data(source, "train", size, wanted, seed)
            order = torch.randperm(len(train), generator=seeded_generator(seed))
            cut = min(settings.n_validation or len(train), len(train) // 2)
            validation, surrogate = train.subset(order[:cut]), train.subset(order[cut:])
        return cls(test, validation, surrogate).limited(settings)

    def limited(self, settings: EvalSettings) -> EvalData:
        """At most as many pictures of each kind as the settings ask for."""
        return EvalData(
            self.test.sample(settings.n, settings.seed),
            self.validation.sample(settings.n_validation, settings.seed),
            self.surrogate.sample(settings.n_surrogate, settings.seed),
        )

    def check(self, class_names: tuple[str, ...]) -> None:
        """Raises ValueError when the pictures have other classes than the model, or none are there."""
        given, expected = ([name.lower() for name in names] for names in (self.test.class_names, class_names))
        if given != expected:
            raise ValueError(
                f"data set {self.test.name!r} has the classes {', '.join(self.test.class_names)}; the model answers "
                f"{', '.join(class_names)}; write model.set_classes(data.class_names), which zero-shot heads allow"
            )
        for kind in ("test", "validation", "surrogate"):
            if len(getattr(self, kind)) == 0:
                raise ValueError(f"data set {self.test.name!r}: there is no {kind} picture")
