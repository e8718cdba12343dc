#!/usr/bin/env python
"""What scripts/demo runs in its virtual environment; see there."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch

from zepad_mm import ZePAD
from zepad_mm.evaluation import PRESETS, EvalData, evaluate
from zepad_mm.plots import write_figures

ROOT = Path(__file__).parents[1]
THREATS = ("clean", "T1", "T1b", "T2", "T3")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/demo", description="A real CLIP attacked, defended and measured.")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out", help="folder of the report and the figures")
    parser.add_argument("--n", type=int, default=None, help="test pictures (default: the preset's; 632 ship)")
    parser.add_argument("--preset", choices=PRESETS.names(), default="demo", help="how hard the attacks are")
    parser.add_argument("--retune", action="store_true", help="tune the branches again first (about 70 minutes)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("zepad_mm").setLevel(logging.INFO)
    model = ZePAD.from_pretrained(retune(args.out) if args.retune else "embedded")
    settings = PRESETS.get(args.preset)
    data = EvalData.load("embedded", settings)
    report = evaluate(model, data=data, settings=settings, threats=THREATS, n=args.n, out=args.out)
    figures = write_figures(report, args.out, model, data)
    print("\n" + report.markdown())
    print("\n".join(["Written:", f"  {args.out / 'report.json'}", *(f"  {path}" for path in figures)]))


def retune(out: Path) -> Path:
    """Tune, assemble and choose anew under ``out``; resumes where it was killed."""
    command = [sys.executable, str(ROOT / "scripts" / "build_embedded_zepad.py"), "--out", str(out / "model")]
    print("tuning the branches from scratch: about 70 minutes on two cores, resumable", flush=True)
    subprocess.run([*command, "--work", str(out / "tuned")], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return out / "model"


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    try:
        main()
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"scripts/demo: {error}")
