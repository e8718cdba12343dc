#!/usr/bin/env python
"""Run the tutorials, and put what they print and the pictures that they save into their pages.

    python -m tools.tutorials      # a minute or two on one core

Each page runs in an empty folder. What a block prints stands below it as a ``text`` block, which is written here. A
picture that is saved as NAME.png becomes docs/images/tutorials/PAGE-NAME.png where the page shows that. The record
results/tutorials.json says which model and which code they are of; run this again whenever one of them changes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import textwrap
import time
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
from PIL import Image

from tests.helpers.documents import ROOT, blocks
from tools.readme_picture import fingerprint
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import read_json, write_json, write_text
from zepad_mm.utils.provenance import origin

PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PICTURES = ROOT / "docs" / "images" / "tutorials"
RECORD = ROOT / "results" / "tutorials.json"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n.*?^```\n)?", re.S | re.M)
WIDTH = 110  # of printed lines; longer ones are broken, as in a terminal
LARGEST = 80_000  # bytes of a picture
WIDTHS, COLOURS = (1280, 900, 720, 600, 500, 420), 160  # pixels and colours that are tried


def code_of(page: Path) -> str:
    """What tells the code of a page from another one."""
    return sha256("\n".join(blocks(page, "python")).encode()).hexdigest()[:16]


def with_outputs(text: str, outputs: list[str]) -> str:
    """The text of a page with the output of each python block below it, where it printed anything."""
    left = iter(outputs)

    def written(match: re.Match[str]) -> str:
        printed = next(left)
        return f"```python\n{match['code']}```\n" + (f"\n```text\n{printed}\n```\n" if printed else "")

    return BLOCK.sub(written, text)


def small_png(image: Image.Image, largest: int = LARGEST) -> bytes:
    """A PNG of few colours, as wide as fits: the noise of an attack leaves little to compress."""
    for width in WIDTHS:
        file, small = io.BytesIO(), image.convert("RGB")
        small.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
        small.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        if file.tell() < largest:
            break
    return file.getvalue()


def shown(page: Path) -> list[str]:
    """Names of the pictures that a page shows, in docs/images/tutorials/."""
    return re.findall(rf"\]\(\.\./images/tutorials/({page.stem}-[\w.]+)\)", page.read_text(encoding="utf-8"))


def run(page: Path) -> tuple[list[str], dict[str, bytes]]:
    """What each python block of a page prints, and the pictures that the page shows."""
    outputs, names = [], {"__name__": "__main__"}
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            for block in blocks(page, "python"):
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    exec(compile(block, str(page), "exec"), names)
                lines = [textwrap.wrap(line, WIDTH) or [""] for line in said.getvalue().strip().splitlines()]
                outputs.append("\n".join(part for line in lines for part in line))
        finally:
            os.chdir(before)
        pictures = {}
        for name in shown(page):
            (path,) = Path(folder).rglob(name.removeprefix(f"{page.stem}-"))
            with Image.open(path) as image:
                pictures[name] = small_png(image)
        return outputs, pictures


def stale_pages() -> list[str]:
    """What of the record does not fit the shipped model, or the pages; empty where all does."""
    record = read_json(RECORD)
    stale = [] if record["fingerprint"] == fingerprint() else ["another model ships"]
    for page in PAGES:
        found, text = record["pages"].get(page.name), page.read_text(encoding="utf-8")
        if found is None or found["code"] != code_of(page) or found["pictures"] != shown(page):
            stale.append(f"{page.name} is new, or its code or its pictures are others")
        elif with_outputs(text, found["outputs"]) != text:
            stale.append(f"{page.name} shows another output than the record")
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    mpl.use("Agg")
    pages: dict[str, Any] = {}
    PICTURES.mkdir(parents=True, exist_ok=True)
    for page in PAGES:
        started = time.perf_counter()
        outputs, pictures = run(page)
        seconds = round(time.perf_counter() - started, 1)
        for name, data in pictures.items():
            with replacing(PICTURES / name) as temporary:
                Path(temporary).write_bytes(data)
        write_text(page, with_outputs(page.read_text(encoding="utf-8"), outputs))
        pages[page.name] = {"code": code_of(page), "outputs": outputs, "pictures": list(pictures), "seconds": seconds}
    write_json(RECORD, {"meta": origin(), "fingerprint": fingerprint(), "pages": pages})


if __name__ == "__main__":
    main()
