#!/usr/bin/env python
"""What scripts/demo runs in its virtual environment; see there. It is ``zepad demo``, or with newly tuned branches."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from zepad_mm.cli import main as zepad

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="A real CLIP attacked, defended and measured.")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="folder of the report and the figures")
    parser.add_argument("--retune", action="store_true", help="tune the branches again first (about 70 minutes)")
    args, others = parser.parse_known_args()
    model = str(retune(args.out)) if args.retune else "embedded"
    return zepad(["demo", "--out", str(args.out), "--model", model, *others])


def retune(out: Path) -> Path:
    """Tune, assemble and choose anew under ``out``; resumes where it was killed."""
    command = [sys.executable, str(ROOT / "scripts" / "build_embedded_zepad.py"), "--out", str(out / "model")]
    print("tuning the branches from scratch: about 70 minutes on two cores, resumable", flush=True)
    subprocess.run([*command, "--work", str(out / "tuned")], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return out / "model"


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"scripts/demo: {error}")
