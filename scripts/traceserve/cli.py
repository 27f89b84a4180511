"""The command `traceserve`; the only place that prints."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, Iterator, NoReturn, Optional, Sequence, Tuple

from traceserve_runtime.errors import TraceserveError

from traceserve import __version__, environment, printing

ARTIFACTS = Path("artifacts")
STORE = Path("model_store")
CONFIG = Path("setup_config.json")

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
    for name, run, add, text in _COMMANDS:
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


# --- export, archive, build -------------------------------------------------------------------------------------------


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="the configuration [%(default)s]")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="artifacts/NAME",
        help="the artifact's folder [artifacts/ and the last part of model_name]",
    )


def _add_gate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--samples",
        type=Path,
        metavar="FILE",
        help="compare on your own texts too: one a line, or request bodies in a .jsonl",
    )
    parser.add_argument(
        "--allow-drift", action="store_true", help="export although answers differ from the original's; it is recorded"
    )


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace what is there")


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, default=STORE, metavar="FOLDER", help="where archives lie [%(default)s]")


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_gate(parser)
    _add_force(parser)


def _add_archive(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="artifacts/NAME", help="a folder that `traceserve export` made")
    _add_store(parser)
    _add_force(parser)


def _add_build(parser: argparse.ArgumentParser) -> None:
    _add_export(parser)
    _add_store(parser)


def _export(options: argparse.Namespace) -> int:
    _make(options, with_archive=False)
    return 0


def _build(options: argparse.Namespace) -> int:
    _make(options, with_archive=True)
    return 0


def _make(options: argparse.Namespace, with_archive: bool) -> Path:
    """Export, and archive; both appear at the end, or neither. Gives the archive's, or the artifact's, path."""
    from contextlib import ExitStack

    from traceserve import archive, config, staging
    from traceserve.errors import ArchiveError, ExportError

    loaded = config.load(options.config)
    for note in loaded.notes:
        printing.console(error=True).print(f"[yellow]note:[/] {note}", highlight=False)
    target: Path = options.output or ARTIFACTS / config.default_name(loaded.config)
    name = archive.check_name(target.resolve().name)
    staging.check_free(target, options.force, ExportError)
    packed = options.store / f"{name}.mar" if with_archive else None
    if packed:
        staging.check_free(packed, options.force, ArchiveError)
    from traceserve.export import export

    started = time.monotonic()
    with printing.Bar() as bar, ExitStack() as stack:
        # The archive's place is entered first, and so filled last.
        archive_folder = stack.enter_context(staging.staged(packed)) if packed else None
        folder = stack.enter_context(staging.staged(target)) / target.name
        folder.mkdir()
        exported = export(loaded, name, folder, bar, options.samples, options.allow_drift)
        if archive_folder:
            bar("packing", 0, 0)
            archive.archive(folder, name, archive_folder)
    if exported.note:
        printing.console().print(exported.note, highlight=False)
    made = packed or target
    printing.print_exported(exported, made, time.monotonic() - started)
    report = staging.write_beside(made, ".report.json", json.dumps(exported.report(), indent=2) + "\n")
    printing.console().print(f"report  {report}", style="dim", highlight=False)
    if packed:
        printing.console().print(f"\nserve it:  traceserve serve {shlex.quote(str(packed))}", highlight=False)
    else:
        printing.console().print(f"\npack it:  traceserve archive {shlex.quote(str(target))}", highlight=False)
    return packed or target


def _archive(options: argparse.Namespace) -> int:
    from traceserve import archive, staging
    from traceserve.errors import ArchiveError

    name = archive.check_name(options.artifact.resolve().name)
    target = options.store / f"{name}.mar"
    staging.check_free(target, options.force, ArchiveError)
    started = time.monotonic()
    with printing.Bar() as bar, staging.staged(target) as folder:
        bar("packing", 0, 0)
        archive.archive(options.artifact, name, folder)
    size = target.stat().st_size
    printing.console().print(
        f"{target}: {printing.megabytes(size)} in {time.monotonic() - started:.1f} s", highlight=False
    )
    printing.console().print(f"\nserve it:  traceserve serve {shlex.quote(str(target))}", highlight=False)
    return 0


# --- serve, stop, status, predict -------------------------------------------------------------------------------------


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "archives", nargs="+", type=Path, metavar="ARCHIVE", help="each answers at /predictions/ and its name"
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        metavar="N",
        help="processes for each archive [what `traceserve tune` wrote into it, else 1]",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="the address to listen on [%(default)s]; any other than the loopback's demands a key of every request",
    )
    _add_port(parser, 8080)
    parser.add_argument("--foreground", action="store_true", help="run until interrupted, for containers and systemd")
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=300,
        metavar="S",
        help="give up when nothing has answered by then [%(default)s s]",
    )


def _add_port(parser: argparse.ArgumentParser, default: Optional[int] = None) -> None:
    text = f"[{default}]" if default else "[of the only server]"
    parser.add_argument(
        "--port", type=_port, default=default, metavar="P", help=f"the port of the REST interface {text}"
    )


def _serve(options: argparse.Namespace) -> int:
    from traceserve import server
    from traceserve.errors import ServerError

    started = time.monotonic()
    with printing.Bar() as bar:
        instance = server.start(
            options.archives, options.host, options.port, options.workers, options.timeout, lambda text: bar(text, 0, 0)
        )
    printing.print_instance(instance, time.monotonic() - started)
    if options.foreground:
        try:
            server.wait(instance)
        finally:
            server.stop(instance)
        raise ServerError("TorchServe ended")
    return 0


def _add_stop(parser: argparse.ArgumentParser) -> None:
    _add_port(parser)
    parser.add_argument("--all", action="store_true", help="stop every server of yours")


def _stop(options: argparse.Namespace) -> int:
    from traceserve import server

    chosen = server.instances() if options.all else [server.find(options.port)]
    for instance in chosen:
        server.stop(instance)
        printing.console().print(f"stopped {', '.join(instance.names)} on port {instance.port}", highlight=False)
    return 0


def _status(options: argparse.Namespace) -> int:
    from rich.table import Table

    from traceserve import server

    running = server.instances()
    if not running:
        printing.console().print("no server is running")
        return 0
    table = Table("archive", "port", "workers", "up", "pid")
    for instance in running:
        alive = server.workers_alive(instance)
        up = time.strftime("%H:%M:%S", time.gmtime(time.time() - instance.started))
        for name in instance.names:
            workers = f"{alive[name]} of {instance.workers[name]}"
            table.add_row(name, str(instance.port), workers, up, str(instance.pid))
    printing.console().print(table)
    for instance in running:
        places = (
            f"{instance.url}/predictions/, metrics http://127.0.0.1:{instance.metrics_port}/metrics, log {instance.log}"
        )
        printing.console().print(f"{instance.port}: {places}", highlight=False, soft_wrap=True)
    return 0


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the archive's name")
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="texts to ask; - reads them from standard input, one a line"
    )
    parser.add_argument("--json", metavar="BODY", help="a request body as JSON, in place of texts")
    parser.add_argument("--file", type=Path, metavar="FILE", help="texts, one a line; or a body, in a .json file")
    parser.add_argument(
        "--parameters",
        metavar="JSON",
        help='the request\'s parameters, as \'{"top_k": 3}\'; see `traceserve tasks`. With "stream": true the text is '
        "printed as it is written",
    )
    _add_port(parser)


def _predict(options: argparse.Namespace) -> int:
    """Print an answer as JSON on a line for each text."""
    from traceserve import client, server
    from traceserve.errors import ServerError

    bodies = list(_bodies(options))
    instance = server.find(options.port)
    if options.name not in instance.names:
        raise ServerError(f"the server on port {instance.port} has no {options.name}, but {', '.join(instance.names)}")
    for body in bodies:
        if isinstance(body, dict) and dict(body.get("parameters") or {}).get("stream") is True:
            for piece in client.stream(instance.url, options.name, body, instance.key):
                print(piece, end="", flush=True)
            print()
            continue
        answer = client.predict(instance.url, options.name, body, instance.key)
        asked = body["inputs"] if isinstance(body, dict) and "inputs" in body else body
        for item in answer if isinstance(asked, list) else [answer]:
            print(json.dumps(item, ensure_ascii=False), flush=True)
    return 0


def _bodies(options: argparse.Namespace) -> Iterator[Any]:
    """The request bodies that the options ask for; each with the parameters, where these are given."""
    if options.parameters is None:
        yield from _inputs(options)
        return
    try:
        parameters = json.loads(options.parameters)
    except ValueError as error:
        _fail(f"predict: --parameters: {error}")
    for inputs in _inputs(options):
        yield {"inputs": inputs, "parameters": parameters}


def _inputs(options: argparse.Namespace) -> Iterator[Any]:
    """What the options ask about; texts of a file go in lists."""
    if sum((bool(options.texts), options.json is not None, options.file is not None)) != 1:
        _fail("predict: give texts, or --json BODY, or --file FILE, or - for standard input")
    try:
        if options.json is not None or (options.file and options.file.suffix == ".json"):
            yield json.loads(options.json if options.json is not None else options.file.read_text(encoding="utf-8"))
            return
        if options.file or options.texts == ["-"]:
            texts = (options.file.read_text(encoding="utf-8") if options.file else sys.stdin.read()).splitlines()
            texts = [text for text in texts if text.strip()]
            yield from (texts[i : i + 32] for i in range(0, len(texts), 32))
        elif len(options.texts) == 1:
            yield options.texts[0]
        else:
            yield options.texts
    except (OSError, ValueError) as error:
        _fail(f"predict: {'--json' if options.json is not None else options.file or 'standard input'}: {error}")


# --- bench ------------------------------------------------------------------------------------------------------------


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="NAME|URL", help="an archive that is being served, or any HTTP endpoint")
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        metavar="FILE",
        help="what is sent, shuffled and again and again: texts, one a line, or a .csv with a column text, or request "
        "bodies in a .jsonl; texts like those that the server will get, as its speed depends on their lengths",
    )
    parser.add_argument(
        "--connections",
        type=_numbers,
        metavar="N[,N...]",
        help="closed loop: each of N connections sends its next request when its last is answered; several are measured "
        "one after the other [16]",
    )
    parser.add_argument(
        "--rate",
        type=_quantity,
        metavar="R",
        help="open loop: R requests a second at random times, whether or not earlier ones are answered, as from many users; "
        "a latency counts from when its request was due, and connections are opened as needed, up to 512",
    )
    parser.add_argument(
        "--seconds", type=_quantity, default=10.0, metavar="S", help="how long each is measured [%(default)g s]"
    )
    parser.add_argument(
        "--warm-up", type=_duration, default=2.0, metavar="S", help="the same load before, uncounted [%(default)g s]"
    )
    parser.add_argument(
        "--compare", metavar="OTHER", help="another NAME or URL, measured in turn, with the ratio of both"
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        metavar="N",
        help="how often all of it is measured; the medians count [3 with --compare, else 1]",
    )
    parser.add_argument(
        "--body",
        metavar="TEMPLATE",
        help='for URLs: the JSON around each text, as \'{"input": ["{text}"]}\' [the text alone, as text/plain]',
    )
    parser.add_argument("--compare-body", metavar="TEMPLATE", help="another one for OTHER [as --body]")
    parser.add_argument(
        "--header",
        action="append",
        type=_header,
        default=[],
        metavar="'K: V'",
        help="for URLs: a header; may be repeated",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order and of the open loop's times [%(default)s]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with curves; it works offline")
    _add_port(parser)


def _bench(options: argparse.Namespace) -> int:
    from traceserve import bench, report, subjects, wire

    wire.require()
    if options.html:
        report.require()
    for path in (options.json, options.html):
        if path and not path.resolve().parent.is_dir():
            _fail(f"bench: there is no folder {path.parent} for {path}")
    if options.rate and len(options.connections or ()) > 1:
        _fail(
            "bench: at a --rate, connections are opened as needed; give --connections one number to begin with, or none"
        )
    plan = bench.Plan(
        connections=options.connections or (16,),
        rate=options.rate,
        seconds=options.seconds,
        warm_up=options.warm_up,
        rounds=options.rounds or (3 if options.compare else 1),
        seed=options.seed,
    )
    headers = dict(options.header)
    measured = [subjects.subject(options.place, options.samples, options.port, options.body, headers)]
    if options.compare:
        body = options.body if options.compare_body is None else options.compare_body
        measured.append(subjects.subject(options.compare, options.samples, options.port, body, headers))
    with printing.Bar() as bar:
        document = bench.measure(
            measured, plan, options.samples.name, lambda what, share: bar(what, int(1000 * share), 1000)
        )
    printing.print_bench(document)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.html:
        options.html.write_text(report.page(document), encoding="utf-8")
    return 0


def _numbers(text: str) -> Tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _duration(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError("should be 0 or more")
    return number


def _quantity(text: str) -> float:
    number = _duration(text)
    if not number:
        raise argparse.ArgumentTypeError("should be more than 0")
    return number


def _header(text: str) -> Tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or any(ord(c) < 32 or ord(c) > 255 for c in text):
        raise argparse.ArgumentTypeError("should look like 'Authorization: Bearer KEY'")
    return name.strip(), value.strip()


# --- tune -------------------------------------------------------------------------------------------------------------


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="whose serving configuration is to be the best")
    parser.add_argument(
        "--samples",
        type=Path,
        required=True,
        metavar="FILE",
        help="texts like those that the server will get: one a line, or a .csv with a column text, or request bodies in a "
        ".jsonl; what is best depends on their lengths",
    )
    parser.add_argument(
        "--target",
        type=_p99,
        metavar="T",
        help="throughput: the most requests a second with all the connections; or p99=MS: the most of which 99 in 100 are "
        "answered within MS milliseconds, with as many connections as that allows [throughput]",
    )
    parser.add_argument(
        "--connections",
        type=_positive,
        default=64,
        metavar="N",
        help="how many requests are on their way at once: as many as your busiest hours have; with p99=MS at most "
        "[%(default)s]",
    )
    parser.add_argument(
        "--budget",
        type=_positive,
        default=300,
        metavar="S",
        help="seconds to measure in; after them the best so far is taken [%(default)s]",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and show, but leave the archive as it is")


def _p99(text: str) -> Optional[float]:
    """The p99 of a target, in seconds; None for throughput."""
    if text == "throughput":
        return None
    name, _, number = text.partition("=")
    try:
        milliseconds = float(number)
    except ValueError:
        milliseconds = 0.0
    if name != "p99" or not 0 < milliseconds < float("inf"):
        raise argparse.ArgumentTypeError("should be throughput, or p99=MS with the milliseconds, as p99=50")
    return milliseconds / 1000


def _tune(options: argparse.Namespace) -> int:
    from traceserve import archive, tune
    from traceserve.errors import ServerError
    from traceserve.racing import Goal

    goal = Goal(options.connections, options.target)
    with printing.Bar() as bar:
        tuned = tune.tune(options.archive, options.samples, goal, options.budget, bar)
    printing.print_tuned(tuned)
    if tuned.chosen is None:
        raise ServerError(tune.missed(tuned.best, goal, options.archive))
    write = tuned.chosen != tuned.own and not options.dry_run
    if write:
        archive.configure(options.archive, tuned.chosen)
    place, screen = shlex.quote(str(options.archive)), printing.console()
    if write:
        said = f"written into {place}: {tune.describe(tuned.chosen)}"
    elif tuned.chosen != tuned.own:
        said = f"not written into {place}, as --dry-run says: {tune.describe(tuned.chosen)}"
    else:
        said = f"nothing better was found; {place} stays as it is: {tune.describe(tuned.chosen)}"
    screen.print(f"\n{said}", highlight=False, soft_wrap=True)
    screen.print(f"serve it:  traceserve serve {place}", highlight=False, soft_wrap=True)
    return 0


# --- demo, config-schema ----------------------------------------------------------------------------------------------


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_port(parser)
    parser.add_argument("--keep", action="store_true", help="leave the server running at the end")


def _demo(options: argparse.Namespace) -> int:
    from rich.table import Table

    from traceserve import client, demo, server, torchserve

    console = printing.console()
    defaults = argparse.Namespace(
        config=demo.CONFIG, output=None, store=STORE, samples=None, allow_drift=False, force=True
    )
    console.rule("build: fit, trace, compare, pack", align="left")
    path = _make(defaults, with_archive=True)
    console.rule("serve: TorchServe", align="left")
    port = options.port or torchserve.free_ports(1)[0]
    started = time.monotonic()
    with printing.Bar() as bar:
        instance = server.start([path], port=port, progress=lambda text: bar(text, 0, 0))
    try:
        printing.print_instance(instance, time.monotonic() - started)
        console.rule("predict: sentences that the model has not seen", align="left")
        held_out = demo.held_out()
        answers = [client.predict(instance.url, path.stem, {"text": text}) for text, _ in held_out]
        table = Table("text", "answer", "score", "expected")
        for (text, label), answer in list(zip(held_out, answers))[::6]:
            table.add_row(text, answer["label"], f"{answer['score']:.2f}", label)
        console.print(table)
        right = sum(answer["label"] == label for answer, (_, label) in zip(answers, held_out))
        console.print(
            f"held-out accuracy over HTTP: {right / len(held_out):.3f} ({right} of {len(held_out)})", highlight=False
        )
    except BaseException:
        server.stop(instance)
        raise
    if options.keep:
        console.print(
            f'\nthe server keeps running: traceserve predict {path.stem} "Where is my order?"', highlight=False
        )
    else:
        server.stop(instance)
        console.print(f"\nthe server was stopped; again: traceserve serve {path}", highlight=False)
    return 0


def _config_schema(options: argparse.Namespace) -> int:
    from traceserve import config

    print(json.dumps(config.json_schema(), indent=2))
    return 0


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", metavar="TASK", help="only this one [all]")
    parser.add_argument("--markdown", action="store_true", help="as the README has them")


def _tasks(options: argparse.Namespace) -> int:
    from traceserve import catalog

    if options.markdown:
        print(catalog.markdown(), end="")
        return 0
    found = [entry for entry in catalog.entries() if options.task in (None, entry.name)]
    if not found:
        _fail(f"there is no task {options.task}, but: {', '.join(entry.name for entry in catalog.entries())}")
    printing.print_tasks(found)
    return 0


def _add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _formats(options: argparse.Namespace) -> int:
    from traceserve import formats

    if options.json:
        print(json.dumps(formats.document(), indent=2))
    else:
        printing.print_formats(list(formats.every_format()))
    return 0


def _fail(message: str) -> NoReturn:
    raise TraceserveError(message)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("should be 1 or more")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError("should be 1 to 65535")
    return number


def _add_nothing(parser: argparse.ArgumentParser) -> None:
    """For a command without options."""


_COMMANDS = (
    (
        "export",
        _export,
        _add_export,
        "Download, trace and compare a model.\n\nWrites artifacts/NAME/: traced_model.pt, "
        "tokenizer.json, traceserve.json. The traced model is compared with the original on\nreal sentences; if it does not "
        "answer as the original does, nothing is written and the exit code is 1.",
    ),
    (
        "archive",
        _archive,
        _add_archive,
        "Pack an artifact with torch-model-archiver.\n\nWrites model_store/NAME.mar; the same "
        "artifact always gives the same bytes.",
    ),
    (
        "build",
        _build,
        _add_build,
        "Export and archive.\n\nThe archive is called as the artifact's folder, and answers at /predictions/NAME.",
    ),
    (
        "serve",
        _serve,
        _add_serve,
        "Start TorchServe on archives.\n\nWaits until each has answered a request. It listens on the "
        "loopback address, without management of models; several\nservers may run side by side on different ports.",
    ),
    ("stop", _stop, _add_stop, "Stop a server."),
    ("status", _status, _add_nothing, "Show the running servers."),
    (
        "predict",
        _predict,
        _add_predict,
        "Ask a running server.\n\nPrints one answer, as JSON, for each text:\n\n"
        '  traceserve predict NAME "some text" "another"\n  traceserve predict NAME --json \'{"inputs": "some text", '
        '"parameters": {"top_k": 3}}\'\n  cat texts.txt | traceserve predict NAME -',
    ),
    (
        "bench",
        _bench,
        _add_bench,
        "Measure a running server.\n\nThroughput, latencies, errors, and of a server of traceserve where the time of a "
        "request goes:\n\n  traceserve bench NAME --samples texts.txt --connections 1,16,64 --html bench.html\n"
        "  traceserve bench NAME --samples texts.txt --rate 200\n  traceserve bench NAME --samples texts.txt "
        "--compare http://127.0.0.1:7997/classify \\\n"
        '    --body \'{"model": "some/model", "input": ["{text}"]}\'',
    ),
    (
        "tune",
        _tune,
        _add_tune,
        "Find an archive's best serving configuration on this machine.\n\nMeasures workers, threads, batch size, batch "
        "delay and length step with real servers, and writes the best into the archive:\n\n"
        "  traceserve tune model_store/NAME.mar --samples texts.txt\n"
        "  traceserve tune model_store/NAME.mar --samples texts.txt --target p99=50\n\nA candidate and the best one so far "
        "run beside each other and are measured in turn; a difference within the noise changes nothing.\nServers that run "
        "already are not touched, but share the processor: the figures are better without them.",
    ),
    (
        "demo",
        _demo,
        _add_demo,
        "All of it on a small real model.\n\nFits a classifier of customers' messages, builds, serves, "
        "and asks it sentences that it has not seen.",
    ),
    (
        "tasks",
        _tasks,
        _add_tasks,
        "Show the tasks: what each is asked, its parameters, what it answers.",
    ),
    (
        "formats",
        _formats,
        _add_formats,
        "Show what goes together: save modes, hardware, dtypes and tasks.\n\nA save mode is how the model is stored in the "
        "archive, and so what the worker runs it with. The keys save_mode,\nhardware, dtype and options of "
        "setup_config.json choose; what cannot work is refused before anything is downloaded:\n\n"
        '  {"model_name": "...", "save_mode": "pretrained", "dtype": "float32", "options": {"torch_compile": true}}',
    ),
    ("config-schema", _config_schema, _add_nothing, "Print the JSON schema of setup_config.json, for editors."),
)


def run_script(command: str) -> None:
    """What the entry scripts call: this command with the script's own arguments."""
    sys.exit(main([command, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
