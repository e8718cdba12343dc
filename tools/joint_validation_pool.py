"""Labelled data sets joined under the union of their class names, as a folder of parquet files for the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features, Image, concatenate_datasets

from zepad_mm.data.loading import class_names_of, find_columns, open_table

SHARE_HELD_OUT = 0.05  # of a set without a validation split


def join(sources: Sequence[str], out: Path, leave_out: Sequence[str] = (), seed: int = 0) -> Path:
    """Write ``train`` and ``validation`` of several sets to ``out``, unless they exist.

    Args:
        sources: ``SET`` or ``SET:SPLIT+SPLIT`` (``train`` without one); SET is anything that ``load_data`` takes. A
            set that is given twice counts twice in training.
        leave_out: class names whose images are dropped.

    ``validation`` is the embedded set's own split, and a random twentieth of any other set.
    """
    if (out / "validation-0.parquet").is_file():
        return out
    parts = [_parts(source, leave_out, seed) for source in sources]
    names = sorted({name for train, _ in parts for name in train.features["label"].names})
    out.mkdir(parents=True, exist_ok=True)
    for split, tables in (("train", [part[0] for part in parts]), ("validation", _once(sources, parts))):
        joined = concatenate_datasets([_relabelled(table, names) for table in tables])
        partial = out / f".{split}.partial"
        joined.to_parquet(str(partial))
        partial.replace(out / f"{split}-0.parquet")
    return out


def _parts(source: str, leave_out: Sequence[str], seed: int) -> tuple[Any, Any]:
    """(train, validation) with the columns image and label, without the left-out classes."""
    name, _, split = source.partition(":")
    train = _plain(open_table(name, split or "train"), name, leave_out)
    if name == "embedded":
        return train, _plain(open_table(name, "validation"), name, leave_out)
    both = train.train_test_split(test_size=SHARE_HELD_OUT, seed=seed)
    return both["train"], both["test"]


def _plain(table: Any, source: str, leave_out: Sequence[str]) -> Any:
    image, label = find_columns(table, source)
    table = table.select_columns([image, label]).rename_columns({image: "image", label: "label"})
    names = class_names_of(table.features, "label")
    kept = [name for name in names if name not in leave_out]
    place = [kept.index(name) if name in kept else -1 for name in names]
    table = table.select([row for row, old in enumerate(table["label"]) if place[old] >= 0])
    return _recast(table, [place[old] for old in table["label"]], kept)


def _relabelled(table: Any, names: Sequence[str]) -> Any:
    own = table.features["label"].names
    return _recast(table, [names.index(own[old]) for old in table["label"]], names)


def _recast(table: Any, labels: list[int], names: Sequence[str]) -> Any:
    """The table with other labels; the encoded images are unchanged."""
    table = table.cast_column("image", Image(decode=False)).remove_columns("label").add_column("label", labels)
    return table.cast(Features({"image": Image(), "label": ClassLabel(names=list(names))}))


def _once(sources: Sequence[str], parts: list[tuple[Any, Any]]) -> list[Any]:
    """The validation part of each set, each set once."""
    return list({source.partition(":")[0]: part[1] for source, part in zip(sources, parts, strict=True)}.values())
