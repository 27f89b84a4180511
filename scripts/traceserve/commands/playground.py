"""playground: a page in the browser for querying models."""

from __future__ import annotations

import argparse
from typing import List

from traceserve_hosts.addresses import is_only_local
from traceserve_runtime.errors import TraceserveError

from traceserve.commands.arguments import port
from traceserve.commands.contract import Command
from traceserve.commands.printing import print_line, print_note

_PORT = 7860


def _add_playground(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "places",
        nargs="*",
        metavar="NAME|URL",
        help="a served archive, or any served model, such as http://HOST:PORT/predictions/NAME; two get the same "
        "requests, side by side [all archives of your running servers]",
    )
    parser.add_argument("--key", metavar="KEY", help="the server's key for predictions [that of your running server]")
    parser.add_argument(
        "--certificate",
        metavar="FILE",
        help="the certificate of a URL's server, or its authority's (PEM)",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="the address of the page [%(default)s]")
    parser.add_argument("--port", type=port, default=_PORT, metavar="P", help="the port of the page [%(default)s]")


def _playground(options: argparse.Namespace) -> int:
    from traceserve.playground import hosting, interface, models
    from traceserve.playground.models import Model

    interface.gradio()
    if len(options.places) > 2:
        raise TraceserveError("playground: one archive, or two side by side; without a name all are shown")
    boards: List[List[Model]]
    if options.places:
        boards = [[models.find_model(place, options.key, options.certificate) for place in options.places]]
        models.check_comparable(boards[0])
    else:
        found, failed = models.every()
        boards = [[model] for model in found]
        for error in failed:
            print_note(f"left out: {error.message}", "warning", error=True)
    if not is_only_local(options.host):
        print_note(
            f"at {options.host} everybody who reaches this machine can ask these models through the page, without a key and "
            "without encryption",
            "warning",
            error=True,
        )
    with hosting.Server(boards, options.host, options.port) as server:
        names = ", ".join(model.description.name for board in boards for model in board)
        print_line(f"{names}: {server.url}\nend it with Ctrl-C")
        server.wait()
    return 0


COMMANDS = (
    Command(
        "playground",
        "Ask what is served, on a page in the browser.\n\nA form for each archive, with its own fields and parameters:\n\n"
        "  traceserve playground\n  traceserve playground NAME\n  traceserve playground NAME OTHER\n"
        "  traceserve playground http://HOST:PORT/predictions/NAME --key KEY",
        _add_playground,
        _playground,
        finds_servers=True,
    ),
)
