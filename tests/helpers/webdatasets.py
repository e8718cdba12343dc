"""Small webdatasets in the form of CLIP_benchmark."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence

import torch
from PIL import Image

TEMPLATES = ("a photo of a {c}.", "a blurry photo of a {c}.")


def webdataset(
    names: Sequence[str], images: int = 12, shards: int = 2, *, seed: int = 0, more: Mapping[str, bytes] | None = None
) -> dict[str, bytes]:
    """Return the files of a repository: ``images`` lossless WebP images in ``shards``, labels in turn.

    Args:
        names: class names.
        images, shards: how many.
        seed: of the pixels.
        more: further members of the last shard, by name.
    """
    generator = torch.Generator().manual_seed(seed)
    files = {
        "classnames.txt": "\n".join(names).encode() + b"\n",
        "zeroshot_classification_templates.txt": "\n".join(TEMPLATES).encode() + b"\n",
        "test/nshards.txt": f"{shards}\n".encode(),
    }
    for shard in range(shards):
        members = dict[str, bytes]()
        for row in range(shard, images, shards):
            pixels = torch.randint(256, (20, 24, 3), generator=generator, dtype=torch.uint8)
            members[f"s{row:07d}.webp"] = _webp(pixels)
            members[f"s{row:07d}.cls"] = str(row % len(names)).encode()
        if shard == shards - 1:
            members |= more or {}
        files[f"test/{shard}.tar"] = _tar(members)
    return files


def _webp(pixels: torch.Tensor) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(encoded, format="WEBP", lossless=True)
    return encoded.getvalue()


def _tar(members: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
