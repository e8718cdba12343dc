"""Kill -9 a command at random moments, start it again the same way, and compare what it ends with."""

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
    """A session of its own, so that nothing but :func:`kill` reaches it."""
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
    """Start, wait, kill -9 it and all that it started; was it still running?

    Not by process group: torchrun gives each worker a session of its own, and workers that outlive their launcher
    would end the run behind the back of the one that resumes it.
    """
    process = start(words)
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        launcher = psutil.Process(process.pid)
        launcher.suspend()  # it starts nothing more while its children are listed
        family = [launcher, *launcher.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=30)
        if alive := [member.pid for member in alive if member.status() != psutil.STATUS_ZOMBIE]:
            raise SystemExit(f"processes {alive} outlived a kill -9 by 30 seconds") from None
        return True


def torment(
    words: list[str],
    folder: Path,
    kills: int,
    moments: random.Random,
    result: Callable[[Path], Any],
    title: str,
    checkpoint: str | None = None,
) -> dict[str, int]:
    """Runs killed again and again until they end by themselves, as many as it takes for so many kills.

    Args:
        words: the command; ``--out FOLDER`` is added.
        folder: where the runs go.
        moments: when to kill: between a fifth of the time that a run takes and its end.
        result: everything of a finished run's folder that must not change.
        checkpoint: a file in a run's folder; counted are the kills that found it, and so were no mere restarts.
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
