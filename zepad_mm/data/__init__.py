"""Labelled images in [0, 1] from parquet files, image folders, the Hub or the embedded set."""

from zepad_mm.data.catalogue import CATALOGUE, CatalogueEntry
from zepad_mm.data.folders import SplitNotFoundError
from zepad_mm.data.in_memory import LabelledImages, joined, load_class_names, load_data, load_embedded, load_templates
from zepad_mm.data.loading import EMBEDDED_DATA, EMBEDDED_SIZE, EMBEDDED_SPLITS, find_columns, open_table
from zepad_mm.data.on_disk import StoredImages, open_images
from zepad_mm.data.streaming import StreamedImages, stream_images
from zepad_mm.utils.images import to_tensor

__all__ = [
    "CATALOGUE",
    "EMBEDDED_DATA",
    "EMBEDDED_SIZE",
    "EMBEDDED_SPLITS",
    "CatalogueEntry",
    "LabelledImages",
    "SplitNotFoundError",
    "StoredImages",
    "StreamedImages",
    "find_columns",
    "joined",
    "load_class_names",
    "load_data",
    "load_embedded",
    "load_templates",
    "open_images",
    "open_table",
    "stream_images",
    "to_tensor",
]
