"""demo: all steps on a small real model."""

from __future__ import annotations

import argparse
import time

from traceserve.archives.names import STORE
from traceserve.commands.arguments import add_port
from traceserve.commands.build import make
from traceserve.commands.contract import Command
from traceserve.commands.printing import ProgressBar, console
from traceserve.commands.serve import print_instance


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add_port(parser, text="[a free one]")
    parser.add_argument("--keep", action="store_true", help="leave the server running at the end")


def _demo(options: argparse.Namespace) -> int:
    from rich.table import Table

    from traceserve.building.checkpoints import demo
    from traceserve.serving import client, configuration, instances, server

    screen = console()
    defaults = argparse.Namespace(
        config=demo.CONFIG,
        output=None,
        store=STORE,
        samples=None,
        keep_samples=False,
        allow_drift=False,
        force=True,
        version=None,
    )
    screen.rule("build: fit, trace, compare, pack", align="left")
    path = make(defaults, with_archive=True)
    screen.rule("serve: TorchServe", align="left")
    port = options.port or configuration.free_ports(1)[0]
    started = time.monotonic()
    with ProgressBar() as bar:
        instance = server.start([path], port=port, progress=lambda text: bar(text, 0, 0))
    try:
        print_instance(instance, time.monotonic() - started)
        screen.rule("predict: sentences that the model has not seen", align="left")
        held_out = demo.held_out()
        answers = [client.predict(instance.url, path.stem, {"text": text}) for text, _ in held_out]
        table = Table("text", "answer", "score", "expected")
        for (text, label), answer in list(zip(held_out, answers))[::6]:
            table.add_row(text, answer["label"], f"{answer['score']:.2f}", label)
        screen.print(table)
        right = sum(answer["label"] == label for answer, (_, label) in zip(answers, held_out))
        screen.print(
            f"held-out accuracy over HTTP: {right / len(held_out):.3f} ({right} of {len(held_out)})", highlight=False
        )
    except BaseException:
        instances.stop(instance)
        raise
    if options.keep:
        screen.print(
            f'\nthe server keeps running: traceserve predict {path.stem} "Where is my order?"', highlight=False
        )
    else:
        instances.stop(instance)
        screen.print(f"\nthe server was stopped; again: traceserve serve {path}", highlight=False)
    return 0


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
