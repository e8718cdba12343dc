"""SIGINT and SIGTERM as a request to stop at the next step, and programs that end with one line and an exit code."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

USER_ERRORS = (ValueError, OSError)  # printed as one line; everything else is a fault of the program
STOPPED = 130  # exit code after SIGINT or SIGTERM
NO_EFFECT = 3  # exit code of a tuning that kept public weights, or of a defence without any measured effect


class Stopped(KeyboardInterrupt):
    """A run that saved its state and ended because of SIGINT or SIGTERM; the message says how to go on."""


class StopRequest:
    """Whether the process was asked to stop; inside :func:`stop_at_next_step`."""

    def __init__(self) -> None:
        self.signal = ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:  # the second Ctrl-C: at once
            raise Stopped("stopped before the step was finished")
        self.signal = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.signal)


@contextmanager
def stop_at_next_step() -> Iterator[StopRequest]:
    """Within, SIGINT and SIGTERM are noted instead of ending the program; a second SIGINT raises :class:`Stopped`.

    Only in the main thread, and only where the caller has no handlers of its own.
    """
    request, before = StopRequest(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, request)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def treat_sigterm_as_sigint() -> None:
    """Let SIGTERM raise KeyboardInterrupt as SIGINT does, in a program whose caller has no handler of their own."""
    with suppress(ValueError):  # not the main thread
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.default_int_handler)


def run_program(main: Callable[[], Any]) -> int:
    """Run ``main``; returns the exit code: 0 or what ``main`` returns if that is an int, 2 for a user error, which is
    printed as one line on stderr, 130 when stopped by SIGINT or SIGTERM."""
    name = os.path.basename(sys.argv[0])
    treat_sigterm_as_sigint()
    try:
        code = main()
    except KeyboardInterrupt as error:
        again = "stopped; start it again with the same settings to go on"
        sys.stderr.write(f"{name}: {one_line(error) if isinstance(error, Stopped) else again}\n")
        return STOPPED
    except USER_ERRORS as error:
        sys.stderr.write(f"{name}: {one_line(error)}\n")
        return 2
    return code if type(code) is int else 0


def exit_at_once(code: int) -> NoReturn:
    """End the program with its files cleaned up, but without waiting for threads that compute and cannot be stopped."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def one_line(error: BaseException) -> str:
    """The message of an error, whatever line breaks it has."""
    return " ".join(str(error).split()) or type(error).__name__
