"""demo: all steps on a small real model."""

from __future__ import annotations

import argparse
import shlex
import time
from typing import TYPE_CHECKING

from traceserve.archives.names import STORE
from traceserve.commands.arguments import add_port
from traceserve.commands.build import make
from traceserve.commands.contract import Command
from traceserve.commands.printing import ProgressBar, console, print_line, printable
from traceserve.commands.serve import print_instance

if TYPE_CHECKING:
    from rich.console import Console

_HEADING = 80  # characters


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add_port(parser, text="[a free one]")
    parser.add_argument("--keep", action="store_true", help="leave the server running at the end")


def _demo(options: argparse.Namespace) -> int:
    from rich.table import Table

    from traceserve.building.checkpoints import demo
    from traceserve.building.gate_options import GateOptions
    from traceserve.serving import client, configuration, instances, server

    screen = console()
    _print_heading(screen, "build: fit, trace, compare, pack")
    path = make(demo.CONFIG, GateOptions(), store=STORE, force=True)
    _print_heading(screen, "serve: TorchServe")
    port = options.port or configuration.free_ports(1)[0]
    started = time.monotonic()
    with ProgressBar() as bar:
        instance = server.start([path], port=port, progress=lambda text: bar(text, 0, 0))
    try:
        print_instance(instance, time.monotonic() - started)
        _print_heading(screen, "predict: sentences that the model has not seen")
        held_out = demo.held_out()
        answers = [client.predict(instance.address, path.stem, {"text": text}) for text, _ in held_out]
        table = Table("text", "answer", "score", "expected")
        for (text, label), answer in list(zip(held_out, answers))[::6]:
            table.add_row(text, printable(answer["label"]), f"{answer['score']:.2f}", label)
        screen.print(table)
        right = sum(answer["label"] == label for answer, (_, label) in zip(answers, held_out))
        print_line(f"held-out accuracy over HTTP: {right / len(held_out):.3f} ({right} of {len(held_out)})")
    except BaseException:
        instances.stop(instance)
        raise
    if options.keep:
        print_line(f'\nthe server keeps running: traceserve predict {path.stem} "Where is my order?"')
    else:
        instances.stop(instance)
        print_line(f"\nthe server was stopped; again: traceserve serve {shlex.quote(str(path))}")
    return 0


def _print_heading(screen: Console, text: str) -> None:
    from rich.rule import Rule

    screen.print(Rule(text, align="left"), width=min(screen.width, _HEADING))


COMMANDS = (
    Command(
        "demo",
        "All steps on a small real model.\n\nTrains a classifier of customers' messages, builds and serves it, "
        "and asks it unseen sentences.",
        _add_demo,
        _demo,
        finds_servers=True,
    ),
)
