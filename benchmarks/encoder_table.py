"""What holds for every kind of encoder: parity, gradient, LoRA, saving, zero-shot or probe, each measured.

Writes ``results/encoders.json`` and ``encoders.md``. Under a minute on one CPU core; downloads nothing: each
model is built small from its library's own config, with random weights, and written by its own library.

    python -m benchmarks.encoder_table [--out results]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from tests.helpers.encoder_checks import TOLERANCE, Row, check
from tests.helpers.encoder_zoo import ZOO
from zepad_mm.utils.io import write_json, write_text
from zepad_mm.utils.provenance import provenance

ROOT = Path(__file__).parents[1]
COLUMNS = (
    "source kind",
    "parity",
    "gradient",
    "LoRA = W + dW",
    "save/load",
    "gradient checkpointing",
    "zero-shot or probe",
)


def line(row: Row) -> str:
    cells = (
        row.name,
        f"{row.parity:.0e}",
        f"{row.smallest_gradient:.0e}",
        f"{row.lora_error:.0e}, {row.lora_layers} layers",
        row.saved,
        row.checkpointing,
        row.task,
    )
    return f"| {' | '.join(cells)} |"


def markdown(rows: list[Row]) -> str:
    """The table and what its columns mean."""
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    return f"""# What holds for every kind of encoder

{len(rows)} small models with random weights, each written to disk by its own library and read back through
`load_encoder`. Written by `benchmarks/encoder_table.py`; `tests/encoders/test_encoder_kinds.py` asserts every cell.

{head}
{chr(10).join(line(row) for row in rows)}

- **parity**: largest difference between `encoder(x)` and the source library's own preprocessing and forward, fp32, over
  images that are enlarged, shrunk, upright and wide (square ones for SigLIP 2 of flexible resolution, which keeps
  aspects where we squash); at most {TOLERANCE:.0e} + {TOLERANCE:.0e} of the value. Images are handed over as floats:
  a library that resizes 8-bit images rounds each pixel to 1/255, which no differentiable preprocessing can.
- **gradient**: of the features to the input; the strongest pixel of the weakest image; finite everywhere.
- **LoRA = W + dW**: largest error of the adapted and of the merged network against deltas added by hand, to the largest
  feature; and how many layers are adapted. Every adapter gets a gradient.
- **save/load**: an encoder tuned in full, an adapter (loaded by us and by peft alone), and a ZePAD of both and the
  untouched base come back bit for bit.
- **gradient checkpointing**: the backward pass recomputes, and the adapters' gradients are the same; "none that runs":
  the library has no switch for this backbone, or one that fails (open_clip 3.3, blocks of type "custom") or does
  nothing (its ModifiedResNet), and `set_gradient_checkpointing` says so.
- **zero-shot or probe**: largest difference of class probabilities to the library's own; for encoders without text the
  held-out accuracy of a linear probe on two kinds of synthetic images.
"""


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the two files")
    out = parser.parse_args(arguments).out
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows, started = [], time.time()
    for name, build in ZOO.items():
        with tempfile.TemporaryDirectory() as scratch:
            torch.manual_seed(0)
            rows.append(check(name, build(Path(scratch) / "model"), Path(scratch) / "out"))
            print(line(rows[-1]), flush=True)
    about = {**provenance(seed=0, config={}), "wall_s": round(time.time() - started, 1)}
    write_json(out / "encoders.json", {"meta": about, "rows": [asdict(row) for row in rows]})
    write_text(out / "encoders.md", markdown(rows))
    return rows


if __name__ == "__main__":
    main()
