"""A server of the embedded model in its own process, for the load and fuzzing benchmarks."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from zepad_mm.data import load_data
from zepad_mm.serve.service import png


@contextmanager
def served(*options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of ``zepad serve embedded``; ended with the block."""
    command = [sys.executable, "-m", "zepad_mm.cli", "serve", "embedded", "--port", "0", "--json", *options]
    # return freed memory at once, so that resident memory is memory in use
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"], process
        finally:
            process.terminate()


def resident_mb(process: subprocess.Popen[str]) -> float:
    """Return the resident memory of the server in MB (Linux)."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def files(count: int = 24, seed: int = 0) -> list[bytes]:
    """Return embedded test images as files of many sizes and formats."""
    draw = random.Random(seed)
    encoded = []
    for image in load_data("embedded", "test", n=count, seed=seed).images:
        resized = Image.open(io.BytesIO(png(image))).resize((draw.randint(20, 900), draw.randint(20, 900)))
        file = io.BytesIO()
        resized.save(file, draw.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
        encoded.append(file.getvalue())
    return encoded
