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

from traceserve import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from traceserve.export import Exported
    from traceserve.server import Instance
    from traceserve.verification import Findings

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
        _print_error(error)
        return 1
    except _Interrupted:
        _console(error=True).print("interrupted; nothing was left half-made")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # an outer edge
        if os.environ.get("TRACESERVE_TRACEBACK"):
            raise
        _console(error=True).print(
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
        _console(error=True).print(f"[yellow]note:[/] {note}", highlight=False)
    target: Path = options.output or ARTIFACTS / config.default_name(loaded.config)
    name = archive.check_name(target.resolve().name)
    staging.check_free(target, options.force, ExportError)
    packed = options.store / f"{name}.mar" if with_archive else None
    if packed:
        staging.check_free(packed, options.force, ArchiveError)
    from traceserve.export import export

    started = time.monotonic()
    with _Bar() as bar, ExitStack() as stack:
        # The archive's place is entered first, and so filled last.
        archive_folder = stack.enter_context(staging.staged(packed)) if packed else None
        folder = stack.enter_context(staging.staged(target)) / target.name
        folder.mkdir()
        exported = export(loaded, name, folder, bar, options.samples, options.allow_drift)
        if archive_folder:
            bar("packing", 0, 0)
            archive.archive(folder, name, archive_folder)
    if exported.note:
        _console().print(exported.note, highlight=False)
    _print_exported(exported, packed or target, time.monotonic() - started)
    if packed:
        _console().print(f"\nserve it:  traceserve serve {shlex.quote(str(packed))}", highlight=False)
    else:
        _console().print(f"\npack it:  traceserve archive {shlex.quote(str(target))}", highlight=False)
    return packed or target


def _archive(options: argparse.Namespace) -> int:
    from traceserve import archive, staging
    from traceserve.errors import ArchiveError

    name = archive.check_name(options.artifact.resolve().name)
    target = options.store / f"{name}.mar"
    staging.check_free(target, options.force, ArchiveError)
    started = time.monotonic()
    with _Bar() as bar, staging.staged(target) as folder:
        bar("packing", 0, 0)
        archive.archive(options.artifact, name, folder)
    size = target.stat().st_size
    _console().print(f"{target}: {_megabytes(size)} in {time.monotonic() - started:.1f} s", highlight=False)
    _console().print(f"\nserve it:  traceserve serve {shlex.quote(str(target))}", highlight=False)
    return 0


def _print_exported(exported: Exported, path: Path, seconds: float) -> None:
    from rich.table import Table

    from traceserve.export import describe

    manifest, findings = exported.manifest, exported.findings
    size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    for label, value in (
        ("file", str(path)),
        ("size", _megabytes(size)),
        ("task", manifest.task),
        ("parameters", f"{exported.parameters:,}"),
        ("shapes", describe(manifest.shapes, manifest.max_length)),
        (
            "largest difference",
            f"{findings.largest_difference:.1e} (limit {findings.limit.difference:.0e}), in {len(findings.cells)} cells",
        ),
        ("answers changed", f"{len(findings.changed)} of {findings.answers}"),
        ("seconds", f"{seconds:.1f}"),
    ):
        table.add_row(label, value)
    _console().print(table, highlight=False)
    if not findings.passed:
        _console(error=True).print("[yellow]warning:[/] the gate did not pass; --allow-drift exported it all the same")
        _print_findings(findings)


def _print_findings(findings: Findings) -> None:
    """The failing cells, and the samples whose answers changed."""
    from rich.table import Table

    console = _console(error=True)
    if findings.failure:
        console.print(f"the exported model failed: {findings.failure}", highlight=False)
    if findings.failed:
        table = Table("batch", "length", "padded", "output", "difference", "limit", title="outputs that differ")
        for cell in findings.failed[:20]:
            row = (
                cell.batch,
                cell.length,
                "yes" if cell.padded else "no",
                cell.output,
                f"{cell.difference:.2e}",
                findings.limit.difference,
            )
            table.add_row(*map(str, row))
        console.print(table)
        if len(findings.failed) > 20:
            console.print(f"and {len(findings.failed) - 20} more of {len(findings.cells)} cells")
    for what, samples in (
        ("answered otherwise", findings.changed),
        ("tokenized otherwise", findings.tokenized_otherwise),
    ):
        if samples:
            shown = ", ".join(f"#{number + 1}" for number in samples[:10])
            console.print(f"{len(samples)} of {findings.answers} samples are {what}: {shown}", highlight=False)


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
    with _Bar() as bar:
        instance = server.start(
            options.archives, options.host, options.port, options.workers, options.timeout, lambda text: bar(text, 0, 0)
        )
    _print_instance(instance, time.monotonic() - started)
    if options.foreground:
        try:
            server.wait(instance)
        finally:
            server.stop(instance)
        raise ServerError("TorchServe ended")
    return 0


def _print_instance(instance: Instance, seconds: float) -> None:
    from traceserve_runtime.tasks import TASKS

    console = _console()
    console.print(f"answering after {seconds:.1f} s at {instance.url}", highlight=False)
    for name in instance.names:
        manifest = instance.manifest(name)
        key = f" -H 'Authorization: Bearer {instance.key}'" if instance.key else ""
        body = json.dumps(TASKS[manifest.task].sample)
        command = (
            f"curl {instance.url}/predictions/{name}{key} -H 'Content-Type: application/json' -d {shlex.quote(body)}"
        )
        console.print(f"\n  {command}", highlight=False, markup=False, soft_wrap=True)
    if instance.key:
        console.print(
            f"\nkeys, valid as long as this server runs:\n  inference   {instance.key}\n  management  {instance.management_key}",
            highlight=False,
        )
    port = "" if instance.port == 8080 else f" --port {instance.port}"
    console.print(
        f"\nmetrics: http://127.0.0.1:{instance.metrics_port}/metrics    log: {instance.log}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"stop it: traceserve stop{port}", highlight=False)


def _add_stop(parser: argparse.ArgumentParser) -> None:
    _add_port(parser)
    parser.add_argument("--all", action="store_true", help="stop every server of yours")


def _stop(options: argparse.Namespace) -> int:
    from traceserve import server

    chosen = server.instances() if options.all else [server.find(options.port)]
    for instance in chosen:
        server.stop(instance)
        _console().print(f"stopped {', '.join(instance.names)} on port {instance.port}", highlight=False)
    return 0


def _status(options: argparse.Namespace) -> int:
    from rich.table import Table

    from traceserve import server

    running = server.instances()
    if not running:
        _console().print("no server is running")
        return 0
    table = Table("archive", "port", "workers", "up", "pid")
    for instance in running:
        alive = f"{server.workers_alive(instance)} of {instance.workers * len(instance.names)}"
        up = time.strftime("%H:%M:%S", time.gmtime(time.time() - instance.started))
        for name in instance.names:
            table.add_row(name, str(instance.port), alive, up, str(instance.pid))
    _console().print(table)
    for instance in running:
        places = (
            f"{instance.url}/predictions/, metrics http://127.0.0.1:{instance.metrics_port}/metrics, log {instance.log}"
        )
        _console().print(f"{instance.port}: {places}", highlight=False, soft_wrap=True)
    return 0


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the archive's name")
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="texts to ask; - reads them from standard input, one a line"
    )
    parser.add_argument("--json", metavar="BODY", help="a request body as JSON, in place of texts")
    parser.add_argument("--file", type=Path, metavar="FILE", help="texts, one a line; or a body, in a .json file")
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
        answer = client.predict(instance.url, options.name, body, instance.key)
        for item in answer if isinstance(body, list) else [answer]:
            print(json.dumps(item, ensure_ascii=False), flush=True)
    return 0


def _bodies(options: argparse.Namespace) -> Iterator[Any]:
    """The request bodies that the options ask for; texts of a file go in lists."""
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

    from traceserve import client, demo, server

    console = _console()
    defaults = argparse.Namespace(
        config=demo.CONFIG, output=None, store=STORE, samples=None, allow_drift=False, force=True
    )
    console.rule("build: fit, trace, compare, pack", align="left")
    path = _make(defaults, with_archive=True)
    console.rule("serve: TorchServe", align="left")
    port = options.port or server.free_ports(1)[0]
    started = time.monotonic()
    with _Bar() as bar:
        instance = server.start([path], port=port, progress=lambda text: bar(text, 0, 0))
    try:
        _print_instance(instance, time.monotonic() - started)
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


# --- printing ---------------------------------------------------------------------------------------------------------


def _console(error: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=error)


def _print_error(error: TraceserveError) -> None:
    from rich.markup import escape

    findings = getattr(error, "findings", None)
    if findings is not None:
        _print_findings(findings)
    _console(error=True).print(f"[red]error:[/] {escape(error.message)}", highlight=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    raise TraceserveError(message)


class _Bar:
    """A progress bar on standard error: called with what is done, and how many steps of how many (0: unknown)."""

    def __init__(self) -> None:
        self._progress: Any = None  # made at the first call: importing rich takes a tenth of a second
        self._task: Any = None
        self._what = ""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is None:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            console = _console(error=True)
            self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
            self._progress.start()
        if what != self._what:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task, self._what = self._progress.add_task(what, total=None), what
        self._progress.update(self._task, completed=done, total=total or None)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


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
    ("config-schema", _config_schema, _add_nothing, "Print the JSON schema of setup_config.json, for editors."),
)


def run_script(command: str) -> None:
    """What the entry scripts call: this command with the script's own arguments."""
    sys.exit(main([command, *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
