"""doctor: whether this machine can build and serve."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Sequence

from traceserve.commands.contract import Command
from traceserve.commands.printing import console, print_line

if TYPE_CHECKING:
    from traceserve.checking.machine_here import MachineCheck

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _doctor(options: argparse.Namespace) -> int:
    from traceserve.checking.machine_here import check_machine

    checks = check_machine()
    if options.json:
        print(json.dumps([check.document() for check in checks], indent=2, ensure_ascii=False))
    else:
        _print_checks(checks)
    return int(any(check.state == "error" for check in checks))


def _print_checks(checks: Sequence[MachineCheck]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for header in ("", "", "found", "what to do"):
        table.add_column(header, overflow="fold")
    for check in checks:
        table.add_row(
            Text(check.state, _COLOURS[check.state]), Text(check.name), Text(check.found), Text(check.advice, "dim")
        )
    console().print(table)
    if not any(check.state == "error" for check in checks):
        print_line("\nthis machine can build and serve: traceserve demo")


COMMANDS = (
    Command(
        "doctor",
        "Check whether this machine can build and serve.\n\nLooks at Python, torch, packages, TorchServe, Java, the "
        "processor, memory, folders and the port, and says what to do.\nIt asks nothing of the network. The exit code is 1 "
        "if something is missing without which nothing works.",
        _add_doctor,
        _doctor,
    ),
)
