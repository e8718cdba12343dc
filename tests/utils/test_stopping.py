"""Programs end with one line and an exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import NoReturn

import pytest

from zepad_mm.utils.stopping import Stopped, run_program, stop_at_next_step


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(30, "Read-only file system", "/ro/out"), 2, "Read-only file system: '/ro/out'"),
        (ValueError("two\nlines"), 2, "two lines"),
        (Stopped("step 3 is saved"), 130, "step 3 is saved"),
        (KeyboardInterrupt(), 130, "start it again with the same settings"),
    ],
)
def test_run_program_prints_one_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> NoReturn:
        raise error

    assert run_program(main) == code
    printed = capsys.readouterr().err
    assert text in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_program_ends_on_signals_with_130(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Work that has no step to wait for: heads, gates, evaluations, pre-training."""
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert run_program(lambda: signal.raise_signal(number)) == 130
    finally:
        for kind, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(kind, handler)
    printed = capsys.readouterr().err
    assert "stopped; start it again with the same settings to go on" in printed
    assert printed.count("\n") == 1


def test_run_program_raises_faults_and_returns_codes() -> None:
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)
    assert [run_program(lambda value=value: value) for value in (3, None, "text", True)] == [3, 0, 0, 0]  # type: ignore[misc]


def test_exit_at_once_cleans_up_and_waits_for_no_thread() -> None:
    code = """
import atexit, threading, time
from zepad_mm.utils.stopping import exit_at_once
threading.Thread(target=time.sleep, args=[600]).start()
atexit.register(print, "cleaned up")
exit_at_once(130)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")


def test_a_second_interrupt_ends_at_once() -> None:
    with stop_at_next_step() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
