"""The three disjoint sets of images that an evaluation needs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from zepad_mm.data import LabelledImages, SplitNotFoundError, load_data
from zepad_mm.evaluation.settings import EvalSettings
from zepad_mm.utils.images import Resize
from zepad_mm.utils.seeding import seeded_generator

log = logging.getLogger(__name__)

DEFAULT_SIZE = 64  # pixels, of images for models without an encoder of ours


def _halves_of_train(source: str, settings: EvalSettings, size: int | Resize) -> tuple[LabelledImages, LabelledImages]:
    """Validation and surrogate images, disjoint, from the training split."""
    wanted = None
    if settings.n_validation is not None and settings.n_surrogate is not None:
        wanted = settings.n_validation + settings.n_surrogate
    train = load_data(source, "train", size, wanted, settings.seed)
    order = torch.randperm(len(train), generator=seeded_generator(settings.seed))
    cut = min(settings.n_validation or len(train), len(train) // 2)
    return train.subset(order[:cut]), train.subset(order[cut:])


@dataclass(frozen=True)
class EvalData:
    """Images by purpose.

    Attributes:
        test: what is reported on; nothing is chosen on it.
        validation: clean images that set detector thresholds.
        surrogate: the attacker's own images; their labels are not used.
    """

    test: LabelledImages
    validation: LabelledImages
    surrogate: LabelledImages

    @classmethod
    def load(cls, source: str, settings: EvalSettings, resize: Resize | None = None) -> EvalData:
        """Load a data set by name or folder.

        Args:
            source: as for ``load_data``.
            settings: names and sizes of the splits, and the size of the images.
            resize: the public encoder's ``preprocess``, whose rule makes the images square (see ``resize_of``); None:
                they are squashed, to 64 pixels where the settings name no size.

        Raises:
            FileNotFoundError: no such data set or split. ValueError: a damaged one.
        """
        size = resize.at(settings.image_size) if resize else settings.image_size or DEFAULT_SIZE
        seed = settings.seed
        test = load_data(source, settings.test_split, size, settings.n, seed)
        validation = surrogate = None
        try:
            validation = load_data(source, settings.validation_split, size, settings.n_validation, seed)
        except SplitNotFoundError as error:
            log.info("%s; drawing validation images from 'train'", error)
        try:
            surrogate = load_data(source, settings.surrogate_split, size, settings.n_surrogate, seed, labelled=False)
        except SplitNotFoundError as error:
            log.info("%s; drawing surrogate images from 'train'", error)
        if validation is None and surrogate is None:
            validation, surrogate = _halves_of_train(source, settings, size)
        elif validation is None:
            validation = load_data(source, "train", size, settings.n_validation, seed)
        elif surrogate is None:
            surrogate = load_data(source, "train", size, settings.n_surrogate, seed, labelled=False)
        assert validation is not None
        assert surrogate is not None
        if validation.class_names != test.class_names:
            raise ValueError(
                f"data set {test.name!r} has the classes {', '.join(test.class_names)} in the split "
                f"{settings.test_split!r} and {', '.join(validation.class_names)} in that of the validation images"
            )
        return cls(test, validation, surrogate).limited(settings)

    def limited(self, settings: EvalSettings) -> EvalData:
        """Return at most as many images of each kind as the settings ask for."""
        return EvalData(
            self.test.sample(settings.n, settings.seed),
            self.validation.sample(settings.n_validation, settings.seed),
            self.surrogate.sample(settings.n_surrogate, settings.seed),
        )

    def check(self, class_names: tuple[str, ...] | None) -> None:
        """Raise ValueError when a set is empty or the model, where its classes are known, has other ones."""
        names = self.test.class_names
        if class_names is not None and [name.lower() for name in names] != [name.lower() for name in class_names]:
            raise ValueError(
                f"data set {self.test.name!r} has the classes {', '.join(names)}; the model answers "
                f"{', '.join(class_names)}; write model.set_classes(data.class_names), which zero-shot heads allow"
            )
        for kind in ("test", "validation", "surrogate"):
            if len(getattr(self, kind)) == 0:
                raise ValueError(f"data set {self.test.name!r}: there is no {kind} image")
