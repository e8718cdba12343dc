"""Tables of images from parquet files, class folders, the Hub or the embedded set."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

import zepad_mm.data.catalogue_entries  # noqa: F401  registers the entries
from zepad_mm.data.catalogue import CATALOGUE, find_entry, select_split
from zepad_mm.data.folders import ImageFiles, SplitNotFoundError, image_files, parquet_files, split_of
from zepad_mm.data.webdataset import IMAGES, Webdataset
from zepad_mm.encoders.prompts import clean_name
from zepad_mm.utils.images import Resize, check_image, read_image
from zepad_mm.utils.io import ASSETS
from zepad_mm.utils.names import check_names
from zepad_mm.utils.registry import did_you_mean

EMBEDDED_DATA = ASSETS / "clothing"
EMBEDDED_SIZE = 128  # side in pixels of what the embedded CLIP sees
SHOWN = 5  # damaged images that an error names
CACHE_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
CASTS = {  # how a column gets the type that is expected
    "image": ", e.g. table.cast_column('image', datasets.Image())",
    "label": ", e.g. table.cast_column('label', ClassLabel(names=['cat', 'dog']))",
}
EMBEDDED_SPLITS = ("surrogate", "train", "validation", "test")


def open_table(source: str, split: str, streaming: bool = False) -> Any:
    """A split, or several as ``train+test``, as a memory-mapped ``datasets.Dataset`` or a stream, not decoded.

    Local folders are never streamed here: see :func:`zepad_mm.data.stream_images`.

    Raises:
        FileNotFoundError: no such folder or split.
        ValueError: a damaged file, a layout that can be read in two ways, or parts with other classes.
        OSError: the cache of ``datasets`` cannot be written.
    """
    from datasets import concatenate_datasets

    tables = [_open(source, part, streaming) for part in split_parts(split)]
    for table in tables[1:]:
        if table.features != tables[0].features:
            raise ValueError(
                f"dataset {source!r}: the parts of {split!r} have other columns or classes: {dict(tables[0].features)} "
                f"and {dict(table.features)!s:.500}"
            )
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables)


def split_parts(split: str) -> list[str]:
    """The splits of ``train+test``. Raises ValueError for one that is named twice."""
    parts = split.split("+")
    if len({split_of(part) for part in parts}) < len(parts):
        raise ValueError(f"split {split!r}: expected each split once, e.g. 'train+test'")
    return parts


def local_folder(source: str) -> Path | None:
    """The folder of a dataset; None for one of the Hub. Raises FileNotFoundError for a path that is no folder."""
    if not source:
        raise FileNotFoundError("dataset '': expected the path of a folder, a Hub name, or 'embedded'")
    if Webdataset.parse(source) is not None:
        return None
    name = split_options(source)[0]
    folder = EMBEDDED_DATA if name == "embedded" else Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name == "embedded" or name.startswith((".", "/", "~")) or folder.exists():
        raise FileNotFoundError(f"{folder} is not a folder; expected parquet files or class folders of images there")
    return None


def hub_name(source: str) -> str | None:
    """The name on the Hub, ``owner/name``, of a dataset that is read from there; None for one of this machine."""
    shards = Webdataset.parse(source)
    if shards is not None:
        return None if shards.is_local else shards.name
    if local_folder(source) is not None:
        return None
    name = split_options(source)[0]
    entry = find_entry(name)
    return name if entry is None else entry.hub


def split_options(source: str) -> tuple[str, dict[str, str]]:
    """``NAME?image=COLUMN&label=COLUMN`` in name and columns. Raises ValueError for other options."""
    name, mark, options = source.rpartition("?")
    if not mark or Path(source).is_dir():
        return source, {}
    pairs = [option.partition("=")[::2] for option in options.split("&")]
    found = {key: unquote(value) for key, value in pairs}
    if not found.keys() <= {"image", "label"} or not all(found.values()) or len(found) < len(pairs):
        raise ValueError(
            f"dataset {source!r}: expected NAME?image=COLUMN&label=COLUMN, each once, got {options!r}; in the name of "
            "a column write %3F for ?, %26 for &, %25 for %"
        )
    return name, found


def _open(source: str, split: str, streaming: bool) -> Any:
    import datasets
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from pyarrow import ArrowException

    datasets.disable_progress_bars()
    shards = Webdataset.parse(source)
    if shards is not None:
        if streaming:
            raise ValueError(f"dataset {source!r} cannot be streamed; write storage='memory' or storage='disk'")
        return _read_webdataset(shards, split)
    folder = local_folder(source)
    if folder is not None:
        files = parquet_files(folder, split)
        if files is None:
            return _image_table(image_files(folder, split))
        return _read_parquet(files, in_memory=folder == EMBEDDED_DATA)
    source = split_options(source)[0]
    entry = find_entry(source)
    hint = did_you_mean(source, ["embedded", *CATALOGUE]) or "."
    give = f"{hint} Give the path of a folder, a Hub name, 'embedded', or one of {', '.join(CATALOGUE)}"
    if entry is None and "/" not in source:  # before the Hub is asked for it, many times where there is no network
        raise FileNotFoundError(
            f"dataset {source!r} is neither a folder here nor a name on the Hub, which is written owner/name{give}"
        )
    hub, config, hub_split = (
        (source, None, split) if entry is None else (entry.hub, entry.config, entry.hub_split(split))
    )
    try:
        table = load_dataset(hub, config, split=hub_split, streaming=streaming)
    except Exception as error:
        _raise_cache_error(error)
        if isinstance(error, ValueError) and "Unknown split" in str(error):
            raise SplitNotFoundError(f"dataset {source!r} has no split {split!r}: {error}") from error
        if any(isinstance(cause, DatasetGenerationError | ArrowException) for cause in _causes(error)):
            first = str(_causes(error)[-1]).partition("\n")[0]
            raise ValueError(f"dataset {source!r} is there and cannot be read ({first[:500]})") from error
        raise FileNotFoundError(
            f"dataset {source!r} is neither a folder here nor reachable on the Hub"
            f"{f' as {hub}' if hub != source else ''} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''})"
            f"{'; HF_HUB_OFFLINE is set, so only downloaded datasets are found' if HF_HUB_OFFLINE else ''}"
            f"{give}"
        ) from error
    return table if entry is None else select_split(entry, table, split)


def _read_webdataset(source: Webdataset, split: str) -> Any:
    """A split as a table of encoded images and class indices. Raises ValueError for shards of another form."""
    from datasets import ClassLabel, load_dataset

    shards, names = source.shards(split), source.class_names()
    try:
        table = load_dataset(
            "webdataset", data_files={split: [_without_wildcards(path) for path in shards]}, split=split
        )
        images = [column for column in table.column_names if column in IMAGES]
        if len(images) != 1 or "cls" not in table.column_names:
            raise ValueError(f"expected one kind of image and .cls, got {', '.join(table.column_names)}")
        table = table.select_columns([images[0], "cls"]).rename_columns({images[0]: "image", "cls": "label"})
        return table.cast_column("label", ClassLabel(names=names))
    except Exception as error:  # errors of datasets come wrapped in one another
        _raise_cache_error(error)
        reason = str(_causes(error)[-1]).partition("\n")[0]
        raise ValueError(
            f"dataset {str(source)!r}, split {split!r}: the shards cannot be read ({reason[:500]})"
        ) from error


def _image_table(files: ImageFiles) -> Any:
    """Paths and labels as a table; the images are read when they are decoded."""
    from datasets import ClassLabel, Dataset, Features, Image

    columns: dict[str, Any] = {"image": [{"bytes": None, "path": path} for path in files.paths]}
    features: dict[str, Any] = {"image": Image(decode=False)}
    if files.labels is not None:
        columns["label"], features["label"] = list(files.labels), ClassLabel(names=list(files.class_names))
    return Dataset.from_dict(columns, Features(features)).cast_column("image", Image())


def parquet_features(file: Any) -> Any:
    """(the open ``ParquetFile``, its ``Features``) of a path or a URL. Raises ValueError for a damaged file."""
    import pyarrow as pa
    from datasets import Features
    from datasets.utils.file_utils import xopen
    from pyarrow.parquet import ParquetFile

    try:
        opened = ParquetFile(xopen(file, "rb") if "://" in str(file) else file)
    except (pa.ArrowException, EOFError) as error:
        raise ValueError(f"{file} is not a complete parquet file ({error})") from error
    return opened, Features.from_arrow_schema(opened.schema_arrow)


def _read_parquet(files: list[Path], in_memory: bool) -> Any:
    """The rows of all files: in memory without a cache, or by the cache of ``datasets``, memory-mapped."""
    import pyarrow as pa
    from datasets import Dataset, concatenate_datasets
    from datasets.table import InMemoryTable

    opened = [parquet_features(file) for file in files]
    for file, (_, features) in zip(files, opened, strict=True):
        if features != opened[0][1]:
            raise ValueError(f"{file} has other columns or classes than {files[0]}: {dict(features)!s:.500}")
    if not sum(one.metadata.num_rows for one, _ in opened):
        raise ValueError(f"{', '.join(map(str, files))}: expected rows, got none")
    if in_memory:
        return concatenate_datasets([Dataset(InMemoryTable(one.read())) for one, _ in opened])
    try:
        return Dataset.from_parquet([_without_wildcards(file) for file in files])
    except Exception as error:  # pyarrow's errors come wrapped in those of datasets
        _raise_cache_error(error)
        if any(isinstance(cause, pa.ArrowException | OSError) for cause in _causes(error)):
            for file, (one, _) in zip(files, opened, strict=True):
                _check_readable(file, one)
        first = str(_causes(error)[-1]).partition("\n")[0]
        raise ValueError(f"{', '.join(map(str, files))} cannot be read together ({first[:500]})") from error


def _check_readable(file: Path, opened: Any) -> None:
    """Raise ValueError where a part of a parquet file is damaged."""
    import pyarrow as pa

    for number in range(opened.num_row_groups):
        try:
            opened.read_row_group(number)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is not a complete parquet file: row group {number} is damaged ({error})"
            ) from error


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return causes


def _raise_cache_error(error: BaseException) -> None:
    """Raise the error of the file system behind ``error``, if there is one: a cache that cannot be written."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in CACHE_ERRORS:
            raise OSError(
                cause.errno,
                f"{os.strerror(cause.errno)}; datasets keeps its cache there: set HF_HOME to a folder that can be "
                "written and has space",
                cause.filename,
            ) from error


def _without_wildcards(path: Path) -> str:
    """The path for ``datasets``, which reads brackets, stars and question marks as wildcards."""
    return re.sub(r"([\[*?])", r"[\1]", str(path.resolve()))


def find_columns(table: Any, source: str, labelled: bool = True) -> tuple[str, str | None]:
    """The names of the image column and the label column, by :func:`choose_columns`."""
    return choose_columns(table.features, source, labelled)


def choose_columns(features: Any, source: str, labelled: bool = True) -> tuple[str, str | None]:
    """The names of the image column and of the label column (None: there is none, and ``labelled`` is False).

    Those that the source asks for as ``NAME?image=COLUMN&label=COLUMN``; else those named "image" and "label"; else the
    only ones of their kind. Raises ValueError if one is missing or several fit.
    """
    from datasets import ClassLabel, Image

    asked = split_options(source)[1]
    image = _choose(features, "image", Image, asked, source)
    if image is None:
        raise ValueError(f"dataset {source!r} has the columns {_described(features)}; expected one of type Image")
    label = _choose(features, "label", ClassLabel, asked, source)
    if label is None and labelled:
        raise ValueError(
            f"dataset {source!r} has no labels: its columns are {_described(features)}; expected class folders, or a "
            f"column of type ClassLabel{CASTS['label']}"
        )
    return image, label


def _choose(features: Any, kind: str, feature: type, asked: dict[str, str], source: str) -> str | None:
    """The column of a kind: asked for, by its name, or the only one of its type."""
    fitting = [name for name, value in features.items() if isinstance(value, feature)]
    wanted = asked.get(kind, kind)
    if wanted in fitting:
        return wanted
    hint = f"write {split_options(source)[0]}?{kind}=COLUMN"
    if kind in asked or wanted in features:
        shown = f"{features[wanted]!s:.200}" if wanted in features else "missing"
        raise ValueError(
            f"dataset {source!r}: the column {wanted!r} is {shown}; expected one of type {feature.__name__}"
            f"{f': {hint} for one of ' + ', '.join(fitting) if fitting else CASTS[kind]}"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"dataset {source!r} has several columns of type {feature.__name__}: {', '.join(fitting)}; {hint}"
        )
    return fitting[0] if fitting else None


def _described(features: Any) -> str:
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in features.items())


def class_names_of(features: Any, label_column: str | None) -> tuple[str, ...]:
    """The class names, cleaned for prompts; none without a label column. Raises ValueError for equal ones."""
    if label_column is None:
        return ()
    names = check_names(features[label_column].names, "class names of the data set", fold_case=False)
    return tuple(clean_name(name) for name in names)


def check_label_column(labels: Sequence[int | None], classes: int, where: str) -> Tensor:
    """The labels (N,) as int64. Raises ValueError, with the first row, where one is missing, hidden or no class."""
    found = torch.tensor([-1 if label is None else int(label) for label in labels], dtype=torch.long)
    wrong = ((found < 0) | (found >= classes)).nonzero().flatten().tolist()
    if wrong:
        value = labels[wrong[0]]
        raise ValueError(
            f"{where}: row {wrong[0]} has {'no label' if value is None else f'the label {value}'}, and so have "
            f"{len(wrong)} of {len(found)} rows; expected class indices from 0 to {classes - 1}. Is it a split whose "
            "labels are hidden?"
        )
    return found


def undecoded(table: Any, image_column: str) -> Any:
    """The table with the encoded images of the column, for :func:`decode`."""
    from datasets import Image

    return table.cast_column(image_column, Image(decode=False))


def decode(row: Any, resize: Resize, where: str) -> Tensor:
    """The image (3, S, S) in [0, 1] of an undecoded row. Raises ValueError, with ``where``, for what is not one."""
    return read_image(*_file_of(row, where), resize)


def check_header(row: Any, where: str) -> None:
    """Raise ValueError, with ``where``, for an undecoded row that holds no image of our formats."""
    check_image(*_file_of(row, where))


def _file_of(row: Any, where: str) -> tuple[Any, str]:
    """The file of an undecoded row, and its name in messages."""
    path = row.get("path") if isinstance(row, dict) else None
    what = f"{where} ({path})" if path else where
    if isinstance(row, dict) and row.get("bytes") is not None:
        return io.BytesIO(row["bytes"]), what
    if not path:
        raise ValueError(f"{what}: expected an image, got None")
    if Path(path).exists() or "://" not in path:
        return path, what
    from datasets.utils.file_utils import xopen  # a member of an archive, or a URL of the Hub

    try:
        with xopen(path, "rb") as file:
            return io.BytesIO(file.read()), what
    except OSError as error:
        raise ValueError(f"{what} could not be read: {error.strerror or error}") from error


def raise_damaged(damaged: Sequence[str], total: int, where: str) -> None:
    """Raise one ValueError for all damaged images, if there are any."""
    if damaged:
        more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
        raise ValueError(
            f"{where}: {len(damaged)} of {total} images cannot be used; replace or delete them: "
            f"{'; '.join(damaged[:SHOWN])}{more}"
        )


def dataset_name(source: str) -> str:
    """The name of a dataset in reports, without local folders."""
    shards = Webdataset.parse(source)
    name = split_options(source)[0] if shards is None else shards.name
    return "clothing" if name == "embedded" else Path(name).name or Path(name).resolve().name
