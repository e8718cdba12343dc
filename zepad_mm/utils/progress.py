"""Progress of long work in plain words: a bar on the terminal, and a log file in the output folder.

The log file (``log.txt``) holds the log lines of this package, each with its time, and every :data:`EVERY` seconds how
far the stage in progress is and how long it still takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from zepad_mm.utils.io import append_line

FILE = "log.txt"
EVERY = 30.0  # seconds between two lines of one stage
PACKAGE = logging.getLogger("zepad_mm")
ONLY_IN_FILE = logging.getLogger("zepad_mm_progress")  # the terminal has the bar
ONLY_IN_FILE.propagate = False
ONLY_IN_FILE.setLevel(logging.INFO)


class _LogFile(logging.Handler):
    """Appends each line to a file, with its time in UTC. A full disk ends the work that is logged, not its log."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created))
        text = " ".join(record.getMessage().split())
        with suppress(OSError):
            append_line(self.path, f"{moment} {text if record.levelno < logging.WARNING else 'warning: ' + text}")


@contextmanager
def log_file(folder: str | Path) -> Iterator[None]:
    """Context in which the log lines of this package also go to ``log.txt`` in a folder that exists.

    A folder that is logged to already, or one inside it, gets no second log. Nobody's level of logging is changed.
    """
    parents = [Path(folder).resolve(), *Path(folder).resolve().parents]
    logged = [handler.path.parent for handler in PACKAGE.handlers if isinstance(handler, _LogFile)]
    if any(place in parents for place in logged):
        yield
        return
    handler = _LogFile(Path(folder).resolve() / FILE)
    for log in (PACKAGE, ONLY_IN_FILE):
        log.addHandler(handler)
    try:
        yield
    finally:
        for log in (PACKAGE, ONLY_IN_FILE):
            log.removeHandler(handler)


def say(log: logging.Logger, text: str, *parts: object) -> None:
    """Log a line at level INFO; where the caller set up no logging it goes to the log file alone."""
    (log if log.isEnabledFor(logging.INFO) else ONLY_IN_FILE).info(text, *parts)


class Progress(tqdm):
    """A progress bar whose state also goes to the log file, in words with the time left.

    Args: as of ``tqdm``; ``desc`` is the name of the stage.
    """

    _logged = 0.0

    def update(self, n: float | None = 1) -> Any:
        shown = super().update(n)
        if not self.disable and time.monotonic() - self._logged > EVERY:
            if self._logged:
                ONLY_IN_FILE.info("%s", describe(self))
            self._logged = time.monotonic()
        return shown


def describe(bar: tqdm) -> str:
    """``tuning by tecoa: step 40 of 700, about 12 min left``."""
    done, total = int(bar.n), int(bar.total or 0)
    left = ""
    if done > bar.initial and total > done:
        seconds = (time.time() - bar.start_t) / (done - bar.initial) * (total - done)
        left = f", about {duration(seconds)} left"
    unit = {"it": "step"}.get(bar.unit, bar.unit)
    return f"{bar.desc.rstrip(': ')}: {unit} {done} of {total or 'unknown'}{left}"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
