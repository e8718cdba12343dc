#!/usr/bin/env python
"""Kill -9 an evaluation, and a crafting run, at random moments; what is resumed must end as if nothing had happened.

    python scripts/kill_evaluate.py --kills 20 --out recipes/results/kill.json

The model, the pictures and the attacks are those of ``zepad evaluate embedded --preset smoke``; crafting is
``zepad attack``, which has no half-way state: it is killed, and started again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zepad_mm.evaluation import Records, Report
from zepad_mm.files import read_tensors, write_json
from zepad_mm.provenance import provenance

ZEPAD = [sys.executable, "-c", "import sys; from zepad_mm.cli import main; sys.exit(main())"]
EVALUATE = ["evaluate", "embedded", "--preset", "smoke", "--threats", "clean,T1,T2,T3", "--n", "12", "--no-figures"]
EVALUATE += ["--resume"]
ATTACK = ["attack", "open_clip:embedded", "--attack", "feature_uap", "--steps", "40", "--n", "200"]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*ZEPAD, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)


def run(words: list[str]) -> float:
    """Seconds of a run to its end."""
    began = time.perf_counter()
    if code := start(words).wait():
        raise SystemExit(f"zepad {' '.join(words)} ended with {code}")
    return time.perf_counter() - began


def kill(words: list[str], seconds: float) -> bool:
    """Start, wait, kill -9; was it still running?"""
    process = start(words)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def outcome(folder: Path) -> tuple[Any, ...]:
    """All of an evaluation that must not change: rows and detection but for seconds, and every single answer."""
    report, records = Report.load(folder), Records.load(folder)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in report.rows]
    answers = {key: classes.tolist() for key, classes in records.predictions.items()}
    return rows, report.detection, answers, {key: mask.tolist() for key, mask in records.flagged.items()}


def perturbation(path: Path) -> list[float]:
    return read_tensors(path)[0]["delta"].flatten().tolist()


def torment(
    words: list[str], folder: Path, kills: int, moments: random.Random, result: Callable[[Path], Any]
) -> dict[str, int]:
    """Runs killed again and again until they end by themselves, as many as it takes for so many kills."""
    seconds = run([*words, "--out", str(folder / "whole")])
    whole, landed, different, runs = result(folder / "whole"), 0, 0, 0
    with tqdm(total=kills, desc=f"killing {words[0]}") as bar:
        while landed < kills:
            out = folder / f"killed-{runs}"
            while kill([*words, "--out", str(out)], moments.uniform(0.2, 1.0) * seconds):
                landed += 1
                bar.update()
                if landed == kills:
                    run([*words, "--out", str(out)])
                    break
            runs += 1
            different += result(out) != whole
    return {"kills": landed, "runs": runs, "different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of the evaluation, and as many of crafting")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("outputs/kill.json"), help="file of the result")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        evaluation = torment(EVALUATE, Path(name) / "evaluation", options.kills, moments, outcome)
        crafting = torment(ATTACK, Path(name) / "crafting", options.kills, moments, perturbation)
    config = {"kills": options.kills, "evaluation": " ".join(EVALUATE), "crafting": " ".join(ATTACK)}
    found = {"evaluation": evaluation, "crafting": crafting}
    write_json(options.out, {"meta": provenance(seed=options.seed, config=config), **found})
    print(found)
    sys.exit(evaluation["different"] + crafting["different"])


if __name__ == "__main__":
    main()
