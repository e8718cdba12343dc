"""The command ``zepad``. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from zepad_mm import __version__
from zepad_mm.cli.attack import ATTACK
from zepad_mm.cli.classify import CLASSIFY
from zepad_mm.cli.common import Command, UsageError, budget
from zepad_mm.cli.defend import DEFEND
from zepad_mm.cli.doctor import DOCTOR
from zepad_mm.cli.evaluate import DEMO, EVALUATE, REPORT
from zepad_mm.cli.publish import CARD, PUSH
from zepad_mm.cli.serve import SERVE
from zepad_mm.utils.stopping import STOPPED, USER_ERRORS, Stopped, treat_sigterm_as_sigint
from zepad_mm.utils.text import parser_message, printable

__all__ = ["COMMANDS", "USER_ERRORS", "UsageError", "budget", "main"]

COMMANDS: dict[str, Command] = {
    "classify": CLASSIFY,
    "attack": ATTACK,
    "defend": DEFEND,
    "evaluate": EVALUATE,
    "report": REPORT,
    "card": CARD,
    "push": PUSH,
    "serve": SERVE,
    "demo": DEMO,
    "doctor": DOCTOR,
}


CONTINUE = {"evaluate": "; to continue, run it with --resume", "defend": "; to continue, run it again"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 1 when ``doctor`` finds something missing; 2 for a user error, printed as one line on
        stderr; 3 when ``defend`` kept untuned weights in a branch, or its defence has no effect; 130 when stopped by
        SIGINT (Ctrl-C) or SIGTERM.
    """
    from jsonargparse import ArgumentError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = _parser()
        if not words:
            parser.print_help()
            return 0
        settings = parser.parse_args(words)
        options = settings[settings.command]
        treat_sigterm_as_sigint()  # a server drains its connections first
        with _messages_on_stderr(logging.WARNING if options.quiet else logging.INFO):
            code = COMMANDS[settings.command].run(options)
        sys.stdout.flush()  # a full disk behind it is an error of this command
        return code
    except BrokenPipeError:  # as in "zepad ... | head": discard the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ArgumentError, UsageError, *USER_ERRORS) as error:
        print(translate_error(error), file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"zepad: {error}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        command = next((word for word in words if word in COMMANDS), "")
        print(f"zepad: stopped{CONTINUE.get(command, '')}", file=sys.stderr)
        return STOPPED


def translate_error(error: BaseException) -> str:
    """One line for stderr, whatever line breaks the message of the exception has."""
    return "zepad: " + printable(parser_message(str(getattr(error, "message", None) or error)))


class _OneLine(logging.Formatter):
    """The message alone, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage())


@contextmanager
def _messages_on_stderr(level: int) -> Iterator[None]:
    """Context in which log lines of this package, and warnings, are one line each on stderr, unless logging is set up.

    The root logger is left alone.
    """
    log, handler = logging.getLogger("zepad_mm"), logging.StreamHandler()
    handler.setFormatter(_OneLine())
    if not logging.getLogger().handlers:  # they would show each line a second time
        log.addHandler(handler)
    before = log.level
    log.setLevel(level)

    def show(message: Warning | str, *about: Any, **more: Any) -> None:
        print(translate_error(Warning(f"warning: {message}")), file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _parser() -> Any:
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Help with defaults that keeps the line breaks of descriptions."""

    parser = ArgumentParser(
        prog="zepad",
        formatter_class=Formatter,
        description="Defend pre-trained image encoders against downstream-agnostic attacks and evaluate the defence.",
        exit_on_error=False,
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, command.parser(), help=command.about)
    return parser
