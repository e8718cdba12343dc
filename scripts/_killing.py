"""Kill -9 a command at random moments, start it again the same way, and compare what it ends with."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """A process group of its own, so that the children of a launcher die with it."""
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ, start_new_session=True
    )


def run(words: list[str]) -> float:
    """Seconds of a run to its end."""
    began = time.perf_counter()
    if code := start(words).wait():
        raise SystemExit(f"{' '.join(words)} ended with {code}")
    return time.perf_counter() - began


def kill(words: list[str], seconds: float) -> bool:
    """Start, wait, kill -9; was it still running?"""
    process = start(words)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def torment(
    words: list[str], folder: Path, kills: int, moments: random.Random, result: Callable[[Path], Any], title: str
) -> dict[str, int]:
    """Runs killed again and again until they end by themselves, as many as it takes for so many kills.

    Args:
        words: the command; ``--out FOLDER`` is added.
        folder: where the runs go.
        moments: when to kill: between a fifth of the time that a run takes and its end.
        result: everything of a finished run's folder that must not change.
    """
    seconds = run([*words, "--out", str(folder / "whole")])
    whole, landed, different, runs = result(folder / "whole"), 0, 0, 0
    with tqdm(total=kills, desc=f"killing {title}") as bar:
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
