"""Kills a command with SIGKILL at random moments, resumes it, and compares its results with an undisturbed run."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm


def start(words: list[str]) -> subprocess.Popen[bytes]:
    """Start the command in its own session, so that only :func:`kill` reaches it."""
    return subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ, start_new_session=True
    )


def run(words: list[str]) -> float:
    """Run the command to its end and return the seconds it took."""
    began = time.perf_counter()
    if code := start(words).wait():
        raise SystemExit(f"{' '.join(words)} ended with {code}")
    return time.perf_counter() - began


def kill(words: list[str], seconds: float) -> bool:
    """Start the command and after ``seconds`` kill it and its children; return whether it was still running.

    The children are listed, not the process group: torchrun gives each worker its own session, and surviving workers
    would finish the run that another process resumes.
    """
    process = start(words)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(process.pid)
        launcher.suspend()  # it starts no more children while they are listed
        family = [launcher, *launcher.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=30)
        if alive := [member.pid for member in alive if member.status() != psutil.STATUS_ZOMBIE]:
            raise SystemExit(f"processes {alive} outlived a kill -9 by 30 seconds") from None
        return True


def kill_and_resume_repeatedly(
    words: list[str],
    folder: Path,
    kills: int,
    moments: random.Random,
    result: Callable[[Path], Any],
    title: str,
    checkpoint: str | None = None,
) -> dict[str, int]:
    """Kill and resume runs until ``kills`` kills have hit; return the counts of kills, runs and different results.

    Args:
        words: the command; ``--out FOLDER`` is added.
        folder: where the runs go.
        moments: draws when to kill: between a fifth of the duration of a run and its end.
        result: returns everything in a finished run's folder that must not change.
        checkpoint: a file in a run's folder; kills after it was written are counted as ``after_a_checkpoint``.
    """
    seconds = run([*words, "--out", str(folder / "whole")])
    whole, landed, different, runs, resumed = result(folder / "whole"), 0, 0, 0, 0
    with tqdm(total=kills, desc=f"killing {title}") as bar:
        while landed < kills:
            out = folder / f"killed-{runs}"
            while kill([*words, "--out", str(out)], moments.uniform(0.2, 1.0) * seconds):
                landed += 1
                resumed += checkpoint is not None and (out / checkpoint).exists()
                bar.update()
                if landed == kills:
                    run([*words, "--out", str(out)])
                    break
            runs += 1
            different += result(out) != whole
    found = {"kills": landed, "runs": runs, "different": different}
    return found if checkpoint is None else {**found, "after_a_checkpoint": resumed}
