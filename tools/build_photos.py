#!/usr/bin/env python
"""Write the few photos that the page and the examples show, from the images of scikit-image.

    pip install scikit-image && python -m tools.build_photos

Their authors put them into the public domain; scikit-image names author and licence in the documentation of each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from zepad_mm.utils.atomic import replacing
from zepad_mm.utils.io import ASSETS, write_text

OUT = ASSETS / "photos"
SIDE, QUALITY = 320, 85  # longer side in pixels; JPEG
PHOTOS = {  # name -> (file of skimage.data, author, licence)
    "cat": ("chelsea.png", "Stefan van der Walt", "CC0"),
    "coffee": ("coffee.png", "Rachel Michetti, courtesy of Pikolo Espresso Bar", "CC0"),
    "rocket": ("rocket.jpg", "SpaceX", "public domain"),
}
CARD = """# Photos

Shown by the page of `zepad serve` and usable with `zepad classify`. Public domain, from the package scikit-image
{version} (`skimage/data`); its documentation of each image states author and licence.

| file | source | author | licence |
|---|---|---|---|
{rows}

At most {side} pixels wide or high, JPEG quality {quality}. Rebuilt by `python -m tools.build_photos`.
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    data = _skimage()
    rows = []
    for name, (file, author, licence) in PHOTOS.items():
        image = Image.open(Path(data.__file__).parent / "data" / file).convert("RGB")
        image.thumbnail((SIDE, SIDE))
        path = OUT / f"{name.replace(' ', '_')}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            image.save(temporary, "JPEG", quality=QUALITY, optimize=True)
        rows.append(f"| `{path.name}` | `{file}` | {author} | {licence} |")
    card = CARD.format(version=data.__version__, rows="\n".join(rows), side=SIDE, quality=QUALITY)
    write_text(OUT / "README.md", card)


def _skimage() -> Any:
    try:
        import skimage
    except ImportError as error:
        raise SystemExit("the photos come with scikit-image: pip install scikit-image") from error
    return skimage


if __name__ == "__main__":
    main()
