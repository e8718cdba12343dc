"""The paper's datasets on the Hub: names, columns, splits, sizes, and fixed row indices for splits of our own.

Entries are based on the documents named in ``evidence``, not on the datasets themselves; columns, classes and sizes are
checked when a dataset is opened.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zepad_mm.data.folders import SplitNotFoundError
from zepad_mm.utils.names import clean_name
from zepad_mm.utils.registry import Registry

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """One dataset of the catalogue.

    Attributes:
        name: short name, accepted by ``load_data`` like the Hub name.
        hub: name on the Hub; None if it is not there in this form, so that a folder is needed.
        sizes: number of rows of each split on the Hub.
        class_names: for prompts, in the order of the labels.
        evidence: documents that the entry is based on, and what of it is unverified.
        config: configuration of the Hub dataset, if it has several.
        image_column, label_column: columns of the Hub dataset.
        split_column: column whose values are the splits, if the Hub has all rows in "train".
        shares: splits of our own, each a share of the Hub's "train"; the last takes the rest.
        digests: SHA-256 of the row indices of each of them.
    """

    name: str
    hub: str | None
    sizes: Mapping[str, int]
    class_names: tuple[str, ...]
    evidence: str
    config: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    split_column: str | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits that can be opened."""
        return tuple(dict.fromkeys([*self.sizes, *self.shares]))

    def hub_split(self, split: str) -> str:
        """The Hub split that contains ``split``. Raises FileNotFoundError if the Hub has no such split or dataset."""
        if self.hub is None:
            raise FileNotFoundError(
                f"dataset {self.name!r} is not on the Hub in this form ({self.evidence}); give the path of a folder "
                "with its parquet files or class folders"
            )
        if split not in self.splits:
            raise SplitNotFoundError(f"dataset {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}")
        return "train" if split in self.shares or self.split_column else split

    def rows(self, split: str) -> list[int]:
        """The fixed row indices of ``split`` in "train", ascending; independent of any random generator.

        Raises:
            ValueError: the rows do not match the committed digest.
        """
        found = split_rows(self.name, self.sizes["train"], self.shares)[split]
        if rows_digest(found) != self.digests.get(split):
            raise ValueError(
                f"split {split!r} of {self.name}: its rows have the digest {rows_digest(found)}, committed is "
                f"{self.digests.get(split)}; results on them would not be comparable"
            )
        return found


def ordered_rows(name: str, n: int) -> list[int]:
    """``n`` row indices in the order of the SHA-256 of "name:row": the same on every machine and library version."""
    return sorted(range(n), key=lambda row: hashlib.sha256(f"{name}:{row}".encode()).digest())


def split_rows(name: str, n: int, shares: Mapping[str, float]) -> dict[str, list[int]]:
    """``n`` row indices split by the SHA-256 of name and index: the same on every machine and library version."""
    order = ordered_rows(name, n)
    parts, begin = {}, 0
    for number, (split, part) in enumerate(shares.items(), start=1):
        end = n if number == len(shares) else begin + round(part * n)
        parts[split], begin = sorted(order[begin:end]), end
    return parts


def rows_digest(rows: list[int]) -> str:
    """SHA-256 of row indices."""
    return hashlib.sha256(",".join(map(str, rows)).encode()).hexdigest()


def find_entry(source: str) -> CatalogueEntry | None:
    """The entry with this short name or Hub name, or None."""
    if source in CATALOGUE:
        return CATALOGUE.get(source)
    return next((entry for entry in map(CATALOGUE.get, CATALOGUE) if entry.hub == source), None)


def select_split(entry: CatalogueEntry, table: Any, split: str) -> Any:
    """The rows of ``split`` in the Hub table (or stream) that contains it, checked against the entry.

    Raises:
        ValueError: another number of classes, other columns, or, for a split of our own, another size or a stream.
            Other sizes and class names are logged as warnings.
    """
    if entry.split_column:
        table = table.filter(lambda value: value == split, input_columns=[entry.split_column])
    indexed = split in entry.shares
    table = _checked_table(entry, table, "train" if indexed else split, strict=indexed)
    if not indexed:
        return table
    if not hasattr(table, "select"):
        raise ValueError(
            f"split {split!r} of {entry.name} is a selection of rows of 'train' and cannot be streamed; write "
            "storage='memory' or storage='disk'"
        )
    return table.select(entry.rows(split))


def _checked_table(entry: CatalogueEntry, table: Any, split: str, strict: bool) -> Any:
    """The table, with the class names of the entry where they differ in spelling only."""
    from datasets import ClassLabel

    lacking = [name for name in (entry.image_column, entry.label_column) if name not in table.features]
    if lacking:
        raise ValueError(
            f"{entry.hub} has the columns {', '.join(table.features)}; the catalogue ({entry.evidence}) expects "
            f"{', '.join(lacking)} too"
        )
    label = table.features[entry.label_column]
    if not isinstance(label, ClassLabel) or len(label.names) != len(entry.class_names):
        raise ValueError(
            f"{entry.hub}: column {entry.label_column!r} is {label!s:.300}; the catalogue ({entry.evidence}) expects "
            f"{len(entry.class_names)} classes: {', '.join(entry.class_names)}"
        )
    expected = entry.sizes.get(split)
    if hasattr(table, "__len__") and expected is not None and len(table) != expected:
        text = f"{entry.hub}, {split}: {len(table)} rows; the catalogue ({entry.evidence}) has {expected}"
        if strict:
            raise ValueError(f"{text}, and its fixed splits need that size; use the Hub's own splits")
        log.warning(text)
    theirs, ours = ([clean_name(name).lower() for name in names] for names in (label.names, entry.class_names))
    if theirs != ours:
        log.warning(
            "%s names its classes %s; the catalogue has %s; the names of the dataset are used",
            entry.hub,
            ", ".join(label.names),
            ", ".join(entry.class_names),
        )
        return table
    return table.cast_column(entry.label_column, ClassLabel(names=list(entry.class_names)))


CATALOGUE: Registry[CatalogueEntry] = Registry("dataset")
