#!/usr/bin/env python
"""The program of scripts/demo: runs ``zepad demo``, with ``--retune`` after tuning the branches from scratch."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from zepad_mm.cli import main as zepad
from zepad_mm.evaluation import Report, acceptance

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="A real CLIP attacked, defended and measured.")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="folder of the report and the figures")
    parser.add_argument("--retune", action="store_true", help="tune the branches again first (hours)")
    options, others = parser.parse_known_args()
    model = retune(options.out) if options.retune else "embedded"
    code = zepad(["demo", "--out", str(options.out), "--model", str(model), *others])
    for failure in acceptance(Report.load(options.out)) if code == 0 else ():
        print(f"acceptance: {failure}", file=sys.stderr)  # for the project: no user's report has it
    return code


def retune(out: Path) -> Path:
    """Tune the branches and select the rule again under ``out``; a killed run resumes."""
    model, tuned = out.resolve() / "model", out.resolve() / "tuned"
    command = [sys.executable, "-m", "tools.build_zepad", "--out", str(model), "--work", str(tuned)]
    print("tuning the branch and the gate from scratch: hours on two cores, resumable", flush=True)
    subprocess.run(command, check=True, cwd=ROOT)
    return model


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    try:
        sys.exit(main())
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"scripts/demo: {error}")
