#!/usr/bin/env python
"""Run the tutorials, and put the pictures that they save into docs/images/tutorials/.

    python -m tools.tutorials      # minutes on one core

Each page runs in an empty folder. What it saves as NAME.png becomes PAGE-NAME.png, which the page shows. The record
results/tutorials.json says which model they are of; run this again whenever another one ships.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
from PIL import Image

from tests.helpers.documents import ROOT, blocks
from tools.readme_picture import fingerprint
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import origin

PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PICTURES = ROOT / "docs" / "images" / "tutorials"
RECORD = ROOT / "results" / "tutorials.json"


def small_png(image: Image.Image) -> bytes:
    """A PNG of at most 256 colours, a third of the size."""
    file = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def run(page: Path) -> dict[str, bytes]:
    """The pictures of a page by their names in docs/images/tutorials/."""
    code = compile("\n".join(blocks(page, "python")), str(page), "exec")
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            exec(code, {"__name__": "__main__"})
        finally:
            os.chdir(before)
        pictures = {}
        for path in sorted(Path(folder).glob("*.png")):
            with Image.open(path) as image:
                pictures[f"{page.stem}-{path.name}"] = small_png(image)
        return pictures


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    mpl.use("Agg")
    pages: dict[str, Any] = {}
    PICTURES.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        started = time.perf_counter()
        pictures = run(page)
        for name, data in pictures.items():
            with replacing(PICTURES / name) as temporary:
                Path(temporary).write_bytes(data)
        pages[page.name] = {"pictures": sorted(pictures), "seconds": round(time.perf_counter() - started, 1)}
    write_json(RECORD, {"meta": origin(), "fingerprint": fingerprint(), "pages": pages})


if __name__ == "__main__":
    main()
