"""serve, stop: archives on TorchServe or Ray Serve."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from traceserve_runtime.errors import TraceserveError

from traceserve.commands.arguments import add_port, add_signature, number_in, port, positive, shares
from traceserve.commands.contract import Command
from traceserve.commands.printing import ProgressBar, is_terminal, print_line
from traceserve.serving import engines

if TYPE_CHECKING:
    from traceserve.serving.instances import Instance


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE", help="each answers at /predictions/NAME")
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="worker processes per archive, on ray replicas [the value that `traceserve tune` wrote into it, else 1]",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="the address to listen on [%(default)s]; except on the loopback address, every request needs a key",
    )
    parser.add_argument(
        "--without-keys",
        action="store_true",
        help="require none, whatever the address: behind a proxy or network rules that decide who may ask",
    )
    add_port(parser, engines.DEFAULT_PORT)
    parser.add_argument(
        "--engine",
        default=engines.TORCHSERVE,
        choices=engines.NAMES,
        help="the server: torchserve, or ray (Ray Serve, with several versions of one name side by side) [%(default)s]",
    )
    parser.add_argument(
        "--shares",
        type=shares,
        default=(),
        metavar="A,B,...",
        help="each archive's share of the requests to its name, for several versions of one name, such as 9,1",
    )
    add_signature(parser, "; later updates need one too")
    parser.add_argument(
        "--most-workers",
        type=positive,
        metavar="N",
        help="ray: add replicas per archive up to N as requests wait, and end them when fewer do [--workers]",
    )
    parser.add_argument(
        "--ongoing",
        type=positive,
        metavar="N",
        help="ray: with --most-workers, the requests that a replica has at a time, beyond which more are started "
        "[twice the batch size]",
    )
    parser.add_argument(
        "--gpus",
        type=_gpus,
        metavar="X",
        help="ray: what each replica takes of a GPU, such as 0.25, or whole ones [all of an archive share one]",
    )
    parser.add_argument("--foreground", action="store_true", help="run until interrupted, for containers and systemd")
    parser.add_argument(
        "--timeout",
        type=positive,
        default=300,
        metavar="S",
        help="give up if nothing has answered by then [%(default)s s]",
    )
    _add_front(parser)


def _add_front(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cors-origin",
        metavar="O",
        help='allow browser requests from pages of this origin, such as https://example.org; "*": any',
    )
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="use TLS, with this certificate and its chain (PEM)"
    )
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="its private key (PEM, without a password; for torchserve RSA)"
    )
    parser.add_argument(
        "--queue",
        type=positive,
        default=1000,
        metavar="N",
        help="queued requests per archive; any more are answered with 503 immediately [%(default)s]",
    )
    parser.add_argument(
        "--largest-body",
        type=positive,
        metavar="MIB",
        help="the size limit of a request or an answer [of a request what one within the archives' limits has at most; of an "
        "answer 64 MiB]",
    )
    parser.add_argument(
        "--metrics-port",
        type=port,
        metavar="P",
        help="serve Prometheus' metrics on this port of --host, without a key; on ray of the loopback address alone [a free "
        "one of the loopback address]",
    )


def _gpus(text: str) -> float:
    """Parse a part of a GPU, or a number of whole ones: Ray knows nothing between."""
    number = number_in(text)
    if not 0 < number < float("inf") or (number > 1 and number != int(number)):
        raise argparse.ArgumentTypeError("should be more than 0 and at most 1, or a whole number")
    return number


def _serve(options: argparse.Namespace) -> int:
    from traceserve.errors import ServerError
    from traceserve.serving import instances, server
    from traceserve.serving.front import FrontendOptions
    from traceserve.serving.log import last_words
    from traceserve.serving.plan import Scaling

    started = time.monotonic()
    front = FrontendOptions(
        options.cors_origin,
        options.certificate,
        options.key,
        options.queue,
        options.largest_body,
        not options.without_keys,
        options.metrics_port,
    )
    with ProgressBar() as bar:
        instance = server.start(
            options.archives,
            options.host,
            options.port,
            options.workers,
            options.timeout,
            lambda text: bar(text, 0, 0),
            front=front,
            engine=options.engine,
            shares=options.shares,
            trusted=options.require_signature,
            scaling=Scaling(options.most_workers, options.ongoing, options.gpus),
        )
    seconds = time.monotonic() - started
    if not options.foreground:
        # Output that goes elsewhere is a log, and a key in it would be kept with it.
        print_instance(instance, seconds, is_terminal(sys.stdout))
        return 0
    try:
        print_instance(instance, seconds)  # a container's output is a log, even with a terminal
        instances.wait(instance)
    except BaseException:  # an interrupt, as from a container or systemd; or an output that nobody reads
        instances.stop(instance)
        raise
    raise ServerError(f"the server ended{last_words(Path(instance.folder))}")


def _add_stop(parser: argparse.ArgumentParser) -> None:
    add_port(parser)
    parser.add_argument("--all", action="store_true", help="stop all your servers")


def _stop(options: argparse.Namespace) -> int:
    from traceserve.serving import instances

    if options.all and options.port is not None:
        raise TraceserveError("stop: give --port or --all, not both")
    dead = [instance for instance in instances.tidy_dead() if options.all or instance.port == options.port]
    running = instances.running()
    if options.all:
        chosen = running
    elif dead and options.port not in {instance.port for instance in running}:
        chosen = []
    else:
        chosen = [instances.find_instance(options.port)]
    for instance in chosen:
        instances.stop(instance)
        print_line(f"stopped {', '.join(instance.names)} on port {instance.port}")
    for instance in dead:
        instances.stop(instance)
        print_line(f"{', '.join(instance.names)} on port {instance.port} had died; its log is removed")
    return 0


def print_instance(instance: Instance, seconds: float, show_key: bool = False) -> None:
    """Print where a server answers, and an example; its key only if asked to."""
    from traceserve_runtime.tasks import TASKS

    from traceserve.serving.curl import curl

    print_line(f"answering after {seconds:.1f} s at {instance.url}")
    for name in instance.names:
        manifest = instance.manifest(name)
        key = ("-H", f"Authorization: Bearer {instance.key if show_key else 'KEY'}") if instance.key else ()
        key = (*key, "--insecure") if instance.certificate else key  # the certificate does not name this machine
        body = TASKS[manifest.task].sample_body(manifest.facts)
        command = curl(instance.predictions_url(name), body, *key)
        print_line(f"\n  {command}")
    port = "" if instance.port == engines.DEFAULT_PORT else f" --port {instance.port}"
    if instance.key:
        shown = f"{instance.key}    all keys, and new ones" if show_key else "shown"
        print_line(f"\nkey: {shown} by `traceserve keys{port}`")
    print_line(f"\nmetrics: {instance.metrics_url}    log: {instance.log}")
    print_line(f"stop it: traceserve stop{port}")


COMMANDS = (
    Command(
        "serve",
        "Start TorchServe, or Ray Serve, on archives.\n\nWaits until each has answered a request. It listens on the "
        "loopback address, without management of models; several\nservers may run side by side on different ports.",
        _add_serve,
        _serve,
        finds_servers=True,
    ),
    Command(
        "stop",
        "Stop a server.",
        _add_stop,
        _stop,
        finds_servers=True,
    ),
)
