#!/usr/bin/env python
"""Take the pictures of the page of ``zepad serve`` for the documents.

    python -m tools.screenshots      # a minute on one core; needs Chromium: apt-get install chromium

The shipped model, an example photo, and the attack on the public encoder; desktop and phone, light and dark. The record
results/screenshots.json says which model they show; run this again whenever another one ships or the page changes.
"""

from __future__ import annotations

import argparse
import io
import sys

from PIL import Image

from tests.helpers.browser import CHROMIUM, SIZES, attack_example, chromium, running
from tools.readme_picture import LABELS, ROOT, fingerprint
from tools.tutorials import small_png
from zepad_mm.classifier import RobustZeroShotClassifier
from zepad_mm.serve import Service
from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import write_json
from zepad_mm.utils.provenance import origin

PICTURES = ROOT / "docs" / "images" / "page"
RECORD = ROOT / "results" / "screenshots.json"
THEMES = ("light", "dark")
LARGEST = 120_000  # bytes of a picture


def take(address: str) -> dict[str, bytes]:
    """Name to PNG, for each size and theme."""
    pictures = {}
    with chromium() as browser:
        for size, (width, height) in SIZES.items():
            for theme in THEMES:
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
                page.goto(f"{address}/?__theme={theme}")
                attack_example(page, ", ".join(LABELS), "public")
                page.wait_for_timeout(1500)  # until the pictures stand and nothing moves
                page.locator("#verdict").evaluate("verdict => verdict.scrollIntoView({behavior: 'instant'})")
                whole = size == "desktop"  # of a phone what fits on it
                with Image.open(io.BytesIO(page.screenshot(full_page=whole))) as image:
                    pictures[f"{size}-{theme}.png"] = small_png(image, LARGEST)
                page.close()
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if CHROMIUM is None:
        sys.exit("no Chromium here; apt-get install chromium")
    with running(Service(RobustZeroShotClassifier.from_pretrained("embedded"))) as address:
        pictures = take(address)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        with replacing(PICTURES / name) as temporary:
            temporary.write_bytes(data)
    write_json(RECORD, {"meta": origin(), "fingerprint": fingerprint(), "pictures": sorted(pictures)})


if __name__ == "__main__":
    main()
