"""Test images of the table, read by pyarrow alone: GPU machines may lack ``datasets``.

Either from folders of parquet files (``DIR/NAME/test-*.parquet``, columns image and label in the layout of
``datasets``), or from one packed file: columns source, part ("test", "train" or "validation"), label and image (bytes
of an image file), and the class names of each source as JSON in the metadata of the schema. :func:`write_pack` makes it
from the folders.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zepad_mm.data import LabelledImages
from zepad_mm.encoders.prompts import clean_name
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.images import Resize, read_image
from zepad_mm.utils.seeding import seeded_generator

METADATA = b"class_names"


@dataclass(frozen=True)
class Rows:
    """Encoded images of one source: files as bytes, their labels, the class names and the source.

    ``drawn`` tells that the rows are in the order of their draw already, as in a pack.
    """

    files: list[bytes]
    labels: list[int]
    class_names: tuple[str, ...]
    source: str
    drawn: bool = False

    def sample(self, n: int, seed: int) -> Rows:
        """The first ``n`` rows of one fixed order; all as they are where there are no more."""
        if len(self.files) <= n:
            return self
        drawn = torch.randperm(len(self.files), generator=seeded_generator(seed)).tolist()
        order = list(range(n)) if self.drawn else drawn[:n]
        return Rows([self.files[i] for i in order], [self.labels[i] for i in order], self.class_names, self.source)

    def decode(self, resize: Resize) -> LabelledImages:
        """The images (N, 3, S, S) in [0, 1], as the encoder itself would resize them. Raises ValueError for damage."""
        named = [(io.BytesIO(file), f"row {row} of {self.source}") for row, file in enumerate(self.files)]
        images = [read_image(file, name, resize) for file, name in named]
        return LabelledImages(torch.stack(images), torch.tensor(self.labels), self.class_names, self.source)


def read_rows(place: Path, source: str, part: str) -> Rows:
    """The rows of one part of a source.

    Args:
        place: a folder with one folder per source, or a packed file.
        source: name of a folder, or of the column "source".
        part: "test", "train" or "validation".

    Raises:
        FileNotFoundError: no such file or part.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if place.is_dir():
        files = sorted([*(place / source).glob(f"{part}-*.parquet"), *(place / source).glob(f"{part}.parquet")])
        if not files:
            raise FileNotFoundError(f"{place / source}: expected files {part}-*.parquet")
        tables = [pq.read_table(file, columns=["image", "label"]) for file in files]
        table = pa.concat_tables(tables)
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        names, images = features["label"]["names"], [image["bytes"] for image in table["image"].to_pylist()]
    else:
        table = pq.read_table(place, filters=[("source", "=", source), ("part", "=", part)])
        names = json.loads(pq.read_schema(place).metadata[METADATA]).get(source, [])
        images = table["image"].to_pylist()
        if not images:
            raise FileNotFoundError(f"{place}: expected rows with source {source!r} and part {part!r}, got none")
    names = tuple(clean_name(name) for name in names)
    return Rows(images, table["label"].to_pylist(), names, source, drawn=not place.is_dir())


def write_pack(root: Path, sources: list[str], path: Path, counts: dict[str, tuple[int, int]], seed: int) -> int:
    """Pack images of each source as they are; the bytes of the file.

    Args:
        root: folder with one folder per source.
        sources: their names.
        path: of the pack.
        counts: source to its number of test and of training images.
        seed: of their order.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {"source": [], "part": [], "label": [], "image": []}
    names = {}
    for source in sources:
        for part, count in zip(("test", "train"), counts[source], strict=True):
            rows = read_rows(root, source, part).sample(count, seed)
            names[source] = list(rows.class_names)
            columns["source"] += [source] * len(rows.files)
            columns["part"] += [part] * len(rows.files)
            columns["label"] += rows.labels
            columns["image"] += rows.files
    table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(names)})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="none")
    return path.stat().st_size
