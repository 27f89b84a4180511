"""The command `traceserve`: picks one of `commands`, and tells its errors."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any, NoReturn, Optional, Sequence

from traceserve_runtime.errors import TraceserveError

from traceserve import __version__, environment, printing
from traceserve.commands import COMMANDS

_DESCRIPTION = """\
A transformer checkpoint to a TorchServe deployment: traced, compared with the original, packed, served, asked.

  traceserve demo                                  all of it on a small real model
  traceserve build                                 what setup_config.json says -> model_store/NAME.mar
  traceserve serve model_store/NAME.mar            start TorchServe on it
  traceserve predict NAME "some text"              ask it
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command; gives its exit code: 0, 1 for an error that is told, 2 for a wrong call, 130 if interrupted."""
    os.environ.update(environment.settings())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(options.run(options) or 0)
    except TraceserveError as error:
        printing.print_error(error)
        return 1
    except _Interrupted:
        printing.console(error=True).print("interrupted; nothing was left half-made")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # an outer edge
        if os.environ.get("TRACESERVE_TRACEBACK"):
            raise
        printing.console(error=True).print(
            f"[red]error:[/] unexpected {type(error).__name__}: {error}\n"
            "(TRACESERVE_TRACEBACK=1 shows where; please report it)",
            highlight=False,
        )
        return 1


class _Interrupted(BaseException):
    """A signal to stop. Not KeyboardInterrupt: once that has passed through an `exec`, as at the import of many
    libraries, Python kills itself at its end whatever was caught."""


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise _Interrupted


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="traceserve", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"traceserve {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers = {}
    for name, text, add, run in COMMANDS:
        parsers[name] = command = commands.add_parser(
            name,
            help=text.split(".")[0].split("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
        command.set_defaults(run=run)
    if arguments and arguments[0] in parsers:  # options may stand between texts too
        return parsers[arguments[0]].parse_intermixed_args(arguments[1:])
    return parser.parse_args(arguments)


def run_script(command: str) -> None:
    """What the entry scripts call: this command with the script's own arguments."""
    sys.exit(main([command, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
