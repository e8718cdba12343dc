"""The three disjoint sets of images that an evaluation needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from zepad_mm.data import LabelledImages, SplitNotFoundError, load_data, load_templates, open_images
from zepad_mm.data.catalogue import ordered_rows, rows_digest
from zepad_mm.evaluation.settings import EvalSettings
from zepad_mm.utils.images import Resize
from zepad_mm.utils.seeding import derived_generator, seeded_generator

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


def rows_by_rule(name: str, total: int, settings: EvalSettings) -> dict[str, list[int]]:
    """Disjoint rows of one split of ``total``: "test", "validation" and "surrogate", each ascending.

    The order is that of the SHA-256 of "name/seed:row": the same images on every machine, and those of a smaller ``n``
    are among those of a larger one. Test images take at most four fifths; the others share the rest.

    Raises:
        ValueError: fewer than three images.
    """
    if total < 3:
        raise ValueError(f"data set {name!r}: expected at least 3 images to draw disjoint parts from, got {total}")
    order = ordered_rows(f"{name}/{settings.seed}", total)
    n = min(settings.n or total, max(1, total * 4 // 5))
    n_validation = min(settings.n_validation or total, (total - n + 1) // 2)
    n_surrogate = min(settings.n_surrogate or total, total - n - n_validation)
    ends = (n, n + n_validation, n + n_validation + n_surrogate)
    begins = (0, *ends[:-1])
    kinds = ("test", "validation", "surrogate")
    return {kind: sorted(order[begin:end]) for kind, begin, end in zip(kinds, begins, ends, strict=True)}


@dataclass(frozen=True)
class EvalData:
    """Images by purpose.

    Attributes:
        test: what is reported on; nothing is chosen on it.
        validation: clean images that set detector thresholds.
        surrogate: the attacker's own images; their labels are not used.
        prompts: templates that come with the data set, for zero-shot heads; None: the model's own.
        origin: of test images drawn by rule: data set, split, its size, and the digest of their rows. JSON-able.
    """

    test: LabelledImages
    validation: LabelledImages
    surrogate: LabelledImages
    prompts: tuple[str, ...] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

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
        if settings.test_split == settings.validation_split == settings.surrogate_split:
            return cls._from_one_split(source, settings, size)
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
        return cls(test, validation, surrogate, load_templates(source)).limited(settings)

    @classmethod
    def _from_one_split(cls, source: str, settings: EvalSettings, size: int | Resize) -> EvalData:
        """Disjoint parts of one split by :func:`rows_by_rule`, for data sets without others."""
        stored = open_images(source, settings.test_split, size)
        parts: dict[str, LabelledImages] = {}
        rows = rows_by_rule(stored.name, len(stored), settings)
        empty = [kind for kind, chosen in rows.items() if not len(chosen)]
        if empty:
            raise ValueError(
                f"data set {stored.name!r}: {len(stored)} images of the split {settings.test_split!r} are too few for "
                f"disjoint test, validation and surrogate images; none are left for {', '.join(empty)}"
            )
        for kind, chosen in rows.items():
            images = stored.subset(chosen)
            pixels = images.fetch(torch.arange(len(images)))
            parts[kind] = LabelledImages(pixels, images.labels, images.class_names, images.name)
        origin = {"name": stored.name, "split": settings.test_split, "of": len(stored)}
        origin["sha256"] = rows_digest(rows["test"])
        return cls(**parts, prompts=load_templates(source), origin=origin)

    def limited(self, settings: EvalSettings) -> EvalData:
        """Return at most as many images of each kind as the settings ask for.

        Where a threat model takes only the first test images, these are in random order: files may be sorted by class.
        """
        test = self.test.sample(settings.n, settings.seed)
        if settings.n_white_box or settings.n_transfer:
            test = test.subset(torch.randperm(len(test), generator=derived_generator(settings.seed, "order of images")))
        return EvalData(
            test,
            self.validation.sample(settings.n_validation, settings.seed),
            self.surrogate.sample(settings.n_surrogate, settings.seed),
            self.prompts,
            self.origin,
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
