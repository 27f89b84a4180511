"""The `traceserve` command: runs one of `commands`, and reports its errors."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Callable, List, NoReturn, Optional, Sequence

from traceserve_hosts import libraries
from traceserve_runtime.errors import TraceserveError

from traceserve import __version__
from traceserve.commands import COMMANDS, printing
from traceserve.commands.completion import CompletingParser
from traceserve.commands.contract import Command
from traceserve.errors import NoSpace, UnwritableOutput
from traceserve.machine import space

_FIRST_SENTENCE = re.compile(r"\.(?=\s|$)|\n")  # ends at it; not within setup_config.json
_DESCRIPTION = """\
A transformer checkpoint to a TorchServe deployment: traced, compared with the original, packed, served and queried.

  traceserve demo                                  all steps on a small real model
  traceserve build                                 setup_config.json -> model_store/NAME.mar
  traceserve serve model_store/NAME.mar            start TorchServe on it
  traceserve predict NAME "some text"              ask it
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command; returns the exit code: 0, 1 for a reported error, 2 for wrong usage, 130 if interrupted.

    Commands whose 1 answers a question (see `Command.trouble`) return 2 for errors."""
    libraries.set_defaults()
    printing.print_in_any_encoding()
    _struck.clear()
    _end_by_signals()
    try:
        with printing.standard_output():
            return _run(_parse(sys.argv[1:] if arguments is None else arguments))
    except _Interrupted:
        return _interrupted()
    except UnwritableOutput as error:  # of --help or --version, which end the program
        printing.print_error(error)
        return 1
    except BrokenPipeError:
        return 1


def _interrupted() -> int:
    """Say that a signal ended the command; returns its exit code."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        printing.print_line("interrupted; nothing was left half-made", error=True)
    return 130


def _run(options: argparse.Namespace) -> int:
    try:
        _tell_where_servers_are(options.command)
        code = int(options.run(options) or 0)
        if sys.stdout is not None:
            sys.stdout.flush()  # what reads it may have gone
        return code
    except TraceserveError as error:
        printing.print_error(_full_disk(error, options) or error)
        return int(options.command.trouble)
    except BrokenPipeError:
        return int(options.command.trouble)
    except Exception as error:  # an outer edge
        if _struck:  # some libraries raise their own exception for any, also for a signal's
            return _interrupted()
        known = _full_disk(error, options) or _refused_path(error)
        if known:
            printing.print_error(known)
            return int(options.command.trouble)
        if os.environ.get("TRACESERVE_TRACEBACK"):
            raise
        told = f"unexpected {type(error).__name__}: {error}\n(TRACESERVE_TRACEBACK=1 shows where; please report it)"
        printing.print_note(told, "error", error=True)
        return int(options.command.trouble)


def _full_disk(error: Exception, options: argparse.Namespace) -> Optional[NoSpace]:
    """Return an error caused by a full disk as NoSpace; None for any other."""
    if isinstance(error, (NoSpace, UnwritableOutput)) or not space.is_full(error):
        return None
    places = [getattr(options, name, None) or Path() for name in ("output", "store")]
    return space.full_disk_error(error, places)


# What the system says of a path that a user named, and what to do.
_ACCESS = "give this user access to it, and to the folders above it, or name another path"
_REFUSED_PATHS = {
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.EROFS: "name a path that can be written",
    errno.ELOOP: "its links lead to each other; name another path",
    errno.ENAMETOOLONG: "name a shorter path",
}


def _refused_path(error: Exception) -> Optional[TraceserveError]:
    """Return the system's refusal of a path as a sentence; None for any other error. Even `Path.is_dir` raises some, before
    Python 3.14."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _REFUSED_PATHS:
        return None
    return TraceserveError(f"{error.filename} cannot be used: {error.strerror}; {_REFUSED_PATHS[error.errno]}")


def _tell_where_servers_are(command: Command) -> None:
    """Note the server directory if it is not the usual one and the command needs it."""
    if command.finds_servers:
        from traceserve.machine import user_folders

        note = user_folders.state_folder_note()
        if note:
            printing.print_note(note, error=True)


_AGAIN = 0.01  # seconds until a signal is sent again
_HANG_UP: Optional[int] = getattr(signal, "SIGHUP", None)  # the end of the terminal; not on Windows


def _end_by_signals() -> None:
    """Let Ctrl-C, SIGTERM and the end of the terminal end the command as an error would: what it started is stopped."""
    for number in (signal.SIGINT, signal.SIGTERM, _HANG_UP):
        # `nohup` starts a command with SIGHUP ignored.
        if number is not None and not (number == _HANG_UP and signal.getsignal(number) is signal.SIG_IGN):
            signal.signal(number, _interrupt)
    if getattr(sys.unraisablehook, "func", None) is not _unraisable:  # a program may run several commands
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


class _Interrupted(BaseException):
    """A signal to stop. Not KeyboardInterrupt: if that passes through an `exec`, as when importing many
    libraries, Python kills itself at the end even if it was caught."""


_struck: List[int] = []  # the signals that came


def _interrupt(number: int, frame: object) -> NoReturn:
    _struck.append(number)
    if number == _HANG_UP:  # the shell and the system may both send it; the second would end the stopping of servers
        signal.signal(number, signal.SIG_IGN)
    raise _Interrupted


def _unraisable(otherwise: Callable[[sys.UnraisableHookArgs], object], lost: sys.UnraisableHookArgs) -> None:
    """Send the signal again where its exception was lost: Python discards one that is raised in a destructor, or in a weak
    reference's callback, and a signal may strike there."""
    if issubclass(lost.exc_type, _Interrupted):
        here = threading.get_ident()  # which may sleep: to another thread, a signal would not wake it
        again = threading.Timer(_AGAIN, signal.pthread_kill, (here, signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        otherwise(lost)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CompletingParser(
        prog="traceserve", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"traceserve {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers = {}
    for command in COMMANDS:
        parsers[command.name] = parser_of_it = commands.add_parser(
            command.name,
            help=_FIRST_SENTENCE.split(command.text)[0],
            description=command.text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add(parser_of_it)
        parser_of_it.set_defaults(run=command.run, command=command)
    parser.complete()
    if arguments and arguments[0] in parsers:  # options may stand between texts too
        return parsers[arguments[0]].parse_intermixed_args(arguments[1:])
    return parser.parse_args(arguments)


def run_script(command: str) -> None:
    """Run this command with an entry script's own arguments."""
    sys.exit(main([command, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
