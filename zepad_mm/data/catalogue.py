"""The paper's data sets as they lie on the Hub: names, columns, splits, sizes, and fixed indices where a split is ours.

Nothing here could be downloaded where it was written. ``known_from`` says what each entry rests on; what a set really
holds is compared when it is opened.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zepad_mm.encoders.prompts import clean_name
from zepad_mm.utils.registry import Registry

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One set of the catalogue.

    Attributes:
        name: short name; ``load_data`` takes it, or the Hub's.
        hub: its name on the Hub; None where there is none of this form, so that a folder is needed.
        sizes: rows of each split on the Hub.
        class_names: as prompts want them, in the order of the labels.
        known_from: what the entry rests on, and what of it is unverified.
        config: of the Hub set, where it has several.
        image_column, label_column: of the Hub set.
        by_column: a column whose values are the splits, where the Hub has all in "train".
        shares: splits of ours, each a share of the Hub's "train"; the last takes the rest.
        digests: SHA-256 of the row numbers of each of them.
    """

    name: str
    hub: str | None
    sizes: Mapping[str, int]
    class_names: tuple[str, ...]
    known_from: str
    config: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    by_column: str | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split that can be opened."""
        return tuple(dict.fromkeys([*self.sizes, *self.shares]))

    def hub_split(self, split: str) -> str:
        """The split of the Hub that holds ``split``. Raises FileNotFoundError for none, or for no set on the Hub."""
        if self.hub is None:
            raise FileNotFoundError(
                f"data set {self.name!r} is not on the Hub in this form ({self.known_from}); give the path of a folder "
                "with its parquet files or class folders"
            )
        if split not in self.splits:
            raise FileNotFoundError(f"data set {self.name!r} has no split {split!r}; it has {', '.join(self.splits)}")
        return "train" if split in self.shares or self.by_column else split

    def rows(self, split: str) -> list[int]:
        """The fixed row numbers of "train" that are ``split``, ascending. No random generator has a part in it.

        Raises:
            ValueError: the rows are not those whose digest is committed.
        """
        found = fixed_rows(self.name, self.sizes["train"], self.shares)[split]
        if digest(found) != self.digests.get(split):
            raise ValueError(
                f"split {split!r} of {self.name}: its rows have the digest {digest(found)}, committed is "
                f"{self.digests.get(split)}; results on them would not be comparable"
            )
        return found


def fixed_rows(name: str, n: int, shares: Mapping[str, float]) -> dict[str, list[int]]:
    """``n`` rows parted by the SHA-256 of name and row number: the same on every machine and version of any library."""
    order = sorted(range(n), key=lambda row: hashlib.sha256(f"{name}:{row}".encode()).digest())
    parts, begin = {}, 0
    for number, (split, part) in enumerate(shares.items(), start=1):
        end = n if number == len(shares) else begin + round(part * n)
        parts[split], begin = sorted(order[begin:end]), end
    return parts


def digest(rows: list[int]) -> str:
    """SHA-256 of row numbers."""
    return hashlib.sha256(",".join(map(str, rows)).encode()).hexdigest()


def find(source: str) -> DataSet | None:
    """The entry of this short name or Hub name."""
    if source in CATALOGUE:
        return CATALOGUE.get(source)
    return next((entry for entry in map(CATALOGUE.get, CATALOGUE) if entry.hub == source), None)


def part_of(entry: DataSet, table: Any, split: str) -> Any:
    """``split`` from the Hub's table (or stream) that holds it, compared with what is written down.

    Raises:
        ValueError: a class too many or too few, other columns, or another size where the split is a fixed index, which
            no stream has. Other sizes and names are warned of.
    """
    if entry.by_column:
        table = table.filter(lambda value: value == split, input_columns=[entry.by_column])
    indexed = split in entry.shares
    table = _compared(entry, table, "train" if indexed else split, strict=indexed)
    if not indexed:
        return table
    if not hasattr(table, "select"):
        raise ValueError(
            f"split {split!r} of {entry.name} is an index into 'train' and cannot be streamed; write storage='memory' "
            "or storage='disk'"
        )
    return table.select(entry.rows(split))


def _compared(entry: DataSet, table: Any, split: str, strict: bool) -> Any:
    """The table, its classes named as written down where they are the same but for their spelling."""
    from datasets import ClassLabel

    lacking = [name for name in (entry.image_column, entry.label_column) if name not in table.features]
    if lacking:
        raise ValueError(
            f"{entry.hub} has the columns {', '.join(table.features)}; the catalogue ({entry.known_from}) expects "
            f"{', '.join(lacking)} too"
        )
    label = table.features[entry.label_column]
    if not isinstance(label, ClassLabel) or len(label.names) != len(entry.class_names):
        raise ValueError(
            f"{entry.hub}: column {entry.label_column!r} is {label!s:.300}; the catalogue ({entry.known_from}) expects "
            f"{len(entry.class_names)} classes: {', '.join(entry.class_names)}"
        )
    expected = entry.sizes.get(split)
    if hasattr(table, "__len__") and expected is not None and len(table) != expected:
        text = f"{entry.hub}, {split}: {len(table)} rows; the catalogue ({entry.known_from}) has {expected}"
        if strict:
            raise ValueError(f"{text}, and the fixed index is of those; use the Hub's own splits")
        log.warning(text)
    theirs, ours = ([clean_name(name).lower() for name in names] for names in (label.names, entry.class_names))
    if theirs != ours:
        log.warning(
            "%s names its classes %s; the catalogue has %s; its own are used",
            entry.hub,
            ", ".join(label.names),
            ", ".join(entry.class_names),
        )
        return table
    return table.cast_column(entry.label_column, ClassLabel(names=list(entry.class_names)))


CATALOGUE: Registry[DataSet] = Registry("data set")
