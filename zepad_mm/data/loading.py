"""Tables of images from parquet files, class folders, the Hub or the embedded set."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from torch import Tensor

import zepad_mm.data.catalogue_entries  # noqa: F401  registers the entries
from zepad_mm.data.catalogue import CATALOGUE, find_entry, select_split
from zepad_mm.encoders.prompts import clean_name
from zepad_mm.utils.images import Resize, read_image
from zepad_mm.utils.io import ASSETS

EMBEDDED_DATA = ASSETS / "clothing"
EMBEDDED_SPLITS = ("surrogate", "train", "validation", "test")


def open_table(source: str, split: str, streaming: bool = False) -> Any:
    """A split, or several as ``train+test``, as a memory-mapped ``datasets.Dataset`` or a stream, not decoded.

    Raises:
        FileNotFoundError: no such folder or split.
        ValueError: a truncated file.
    """
    from datasets import concatenate_datasets

    tables = [_open(source, part, streaming) for part in split.split("+")]
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)


def _open(source: str, split: str, streaming: bool) -> Any:
    import datasets
    from datasets import load_dataset
    from huggingface_hub.constants import HF_HUB_OFFLINE

    datasets.disable_progress_bars()
    folder = EMBEDDED_DATA if source == "embedded" else Path(source)
    if folder.is_dir():
        files = sorted(str(path) for path in folder.glob(f"{split}*.parquet"))
        if files:
            return _read_parquet(files, streaming)
        if any(folder.glob("*.parquet")):
            available = sorted({path.name.split("-")[0].removesuffix(".parquet") for path in folder.glob("*.parquet")})
            raise FileNotFoundError(f"dataset {source!r} has no split {split!r}; it has {', '.join(available)}")
        return load_dataset("imagefolder", data_dir=str(folder), split=split, streaming=streaming)
    if source == "embedded" or source.startswith((".", "/")):
        raise FileNotFoundError(f"{folder} is not a folder; expected parquet files or class folders of images there")
    entry = find_entry(source)
    hub, config, hub_split = (
        (source, None, split) if entry is None else (entry.hub, entry.config, entry.hub_split(split))
    )
    try:
        table = load_dataset(hub, config, split=hub_split, streaming=streaming)
    except Exception as error:
        raise FileNotFoundError(
            f"dataset {source!r} is neither a folder here nor reachable on the Hub"
            f"{f' as {hub}' if hub != source else ''} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
            f"{'; HF_HUB_OFFLINE is set, so only downloaded datasets are found' if HF_HUB_OFFLINE else ''}; give "
            f"the path of a folder, a Hub name, 'embedded', or one of {', '.join(CATALOGUE)}"
        ) from error
    return table if entry is None else select_split(entry, table, split)


def _read_parquet(files: list[str], streaming: bool) -> Any:
    from datasets import Dataset, IterableDataset

    try:
        return (IterableDataset if streaming else Dataset).from_parquet(files)
    except Exception as error:  # pyarrow, datasets and fsspec raise errors of their own
        raise ValueError(f"{', '.join(files)} is not a complete parquet file ({error})") from error


def find_columns(table: Any, source: str) -> tuple[str, str]:
    """The names of the image column and the label column. Raises ValueError if one is missing."""
    from datasets import ClassLabel, Image

    images = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in table.features.items() if isinstance(feature, ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"dataset {source!r} has the columns {dict(table.features)}; expected one of type Image and one ClassLabel"
        )
    return images[0], "label" if "label" in labels else labels[0]


def read_class_names(table: Any, label_column: str) -> tuple[str, ...]:
    """The class names, cleaned for prompts."""
    return tuple(clean_name(name) for name in table.features[label_column].names)


def undecoded(table: Any, image_column: str) -> Any:
    """The table with the encoded images of the column, for :func:`decode`."""
    from datasets import Image

    return table.cast_column(image_column, Image(decode=False))


def decode(row: Any, resize: Resize, where: str) -> Tensor:
    """The image (3, S, S) in [0, 1] of an undecoded row. Raises ValueError, with ``where``, for what is not one."""
    path = row.get("path") if isinstance(row, dict) else None
    what = f"{where} ({path})" if path else where
    if isinstance(row, dict) and row.get("bytes") is not None:
        return read_image(io.BytesIO(row["bytes"]), what, resize)
    if not path:
        raise ValueError(f"{what}: expected an image, got none")
    if Path(path).is_file():
        return read_image(path, what, resize)
    from datasets.utils.file_utils import xopen  # a member of an archive, or a URL of the Hub

    try:
        with xopen(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise ValueError(f"{what} could not be read: {error.strerror or error}") from error
    return read_image(io.BytesIO(content), what, resize)


def dataset_name(source: str) -> str:
    """The name of a dataset in reports, without local folders."""
    return "clothing" if source == "embedded" else Path(source).name
