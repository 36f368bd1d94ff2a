"""The command line: finds the command, runs it, prints what came out and sets the exit status.

Exit status: 0 done; 2 bad input, one line ``error: ...`` on standard error, nothing half written; 143 after SIGTERM,
130 after an interrupt; 1 for training that diverged and for everything unexpected. With ``--json`` standard output
holds exactly one JSON object. Progress and messages go to standard error.

Knows no torch and no model: `ptengine --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from ptengine import __version__
from ptengine.commands import COMMANDS, Outcome
from ptengine.errors import InputError, TrainingDiverged

__all__ = ["main", "make_parser"]

_OVERVIEW = f"""usage: ptengine COMMAND [options]

Tunes prompts against a frozen Hugging Face model: exact, fast and small.

commands:
{chr(10).join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())}

`ptengine COMMAND --help` lists a command's options and shows an example. Every command has --json.

example:
  ptengine demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` without the program by default) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The command line reads local folders only; set before transformers is imported, which reads it then.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        with _termination(), _plain_warnings():
            return _run(arguments)
    except InputError as error:
        return _fail(error, 2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return _fail(error, 1)
        # Whichever option it came from.
        return _fail(InputError(f"expected a name that the system takes, got {error.filename!r}: {error.strerror}"), 2)
    except TrainingDiverged as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def make_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command, with the options every command has."""
    module = importlib.import_module(f"ptengine.commands.{command}")
    summary = COMMANDS[command]
    parser = _Parser(
        prog=f"ptengine {command}",
        usage="%(prog)s [options]",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n{module.EXAMPLE}",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print(_OVERVIEW, end="")
        return 0
    if arguments and arguments[0] == "--version":
        print(f"ptengine {__version__}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        got = repr(arguments[0]) if arguments else "none"
        raise InputError(f"expected a command, one of {', '.join(COMMANDS)}, got {got}; see ptengine --help")
    parser = make_parser(arguments[0])
    try:
        args, unknown = parser.parse_known_args(arguments[1:])
    except SystemExit as done:  # --help
        return int(done.code or 0)
    if unknown:
        raise InputError(f"expected options of `{parser.prog} --help`, got {unknown[0]!r}")
    # Whatever a library prints must not end up between the result's lines.
    with contextlib.redirect_stdout(sys.stderr):
        outcome: Outcome = args.run(args)
    _print(outcome, args.json)
    return outcome.status


def _print(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        text = json.dumps(outcome.data, allow_nan=False, ensure_ascii=False)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:  # a terminal of few letters, or the name of a file that is no UTF-8
            text = json.dumps(outcome.data, allow_nan=False)
        print(text)
        return
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    for part in outcome.shown:
        console.print(part)


def _fail(error: Exception, status: int) -> int:
    """One line, whatever the message holds."""
    print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        said = message if missing == message else f"expected {missing}, got none"
        raise InputError(f"{said}; see {self.prog} --help")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


_PATIENCE = 2.0
"""Seconds until an exit that has not got through is asked for again: far more than tidying up takes."""


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM unwinds the stack, so temporary files go, and exits 143; a training run handles it itself meanwhile.

    Python discards an exit that is raised inside a finaliser, and some libraries make something else of one that is
    raised inside their imports or callbacks: it is asked for again, and whatever came of it the status is 143.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received, over = threading.Event(), threading.Event()

    def insist() -> None:
        while not over.wait(_PATIENCE):
            # To the thread that is to go, whose waiting a signal then ends; another's would go on.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        if not received.is_set():
            received.set()
            threading.Thread(target=insist, daemon=True).start()
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except BaseException:
        if not received.is_set():
            raise
    finally:
        over.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
    if received.is_set():
        sys.exit(128 + signal.SIGTERM)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the source line they came from, and each line once."""
    shown: set[str] = set()

    def show(message: Any, *rest: Any, **more: Any) -> None:
        line = f"warning: {' '.join(str(message).splitlines())}"
        if line not in shown:
            shown.add(line)
            print(line, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
