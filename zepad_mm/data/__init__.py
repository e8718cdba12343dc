"""Data in: ``datasets`` parquet, folders of pictures, the Hub or the embedded set; images in [0, 1] out."""

from zepad_mm.data.catalogue import CATALOGUE, DataSet
from zepad_mm.data.in_memory import LabelledImages, load_data, load_embedded
from zepad_mm.data.loading import EMBEDDED_DATA, EMBEDDED_SPLITS, columns_of, open_table, to_tensor
from zepad_mm.data.on_disk import StoredImages, StreamedImages, open_images, stream_images

__all__ = [
    "CATALOGUE",
    "EMBEDDED_DATA",
    "EMBEDDED_SPLITS",
    "DataSet",
    "LabelledImages",
    "StoredImages",
    "StreamedImages",
    "columns_of",
    "load_data",
    "load_embedded",
    "open_images",
    "open_table",
    "stream_images",
    "to_tensor",
]
