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
from typing import TYPE_CHECKING, Any, Iterator, NoReturn, Optional, Sequence

from traceserve_runtime.errors import TraceserveError

from traceserve import __version__, printing

if TYPE_CHECKING:
    pass

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
    # Before torch is imported: OpenMP's waiting threads would spin and starve whatever shares the processor.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
    printing.print_exported(exported, packed or target, time.monotonic() - started)
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
        "--workers", type=_positive, default=1, metavar="N", help="processes for each archive [%(default)s]"
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
        alive = f"{server.workers_alive(instance)} of {instance.workers * len(instance.names)}"
        up = time.strftime("%H:%M:%S", time.gmtime(time.time() - instance.started))
        for name in instance.names:
            table.add_row(name, str(instance.port), alive, up, str(instance.pid))
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
    ("config-schema", _config_schema, _add_nothing, "Print the JSON schema of setup_config.json, for editors."),
)


def run_script(command: str) -> None:
    """What the entry scripts call: this command with the script's own arguments."""
    sys.exit(main([command, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
