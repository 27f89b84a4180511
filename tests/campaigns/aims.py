"""What the campaigns share: aims and their table, options, an archive to try, and a server of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Optional, Sequence

import models
from rich.console import Console
from rich.table import Table
from traceserve.serving import client, configuration, instances, server
from traceserve.serving.front import FrontendOptions
from traceserve.serving.instances import Instance

TRACESERVE = (sys.executable, "-m", "traceserve")
LABELS = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
_STARTING = 300  # seconds


class Aim(NamedTuple):
    """One line of a campaign's table; `of_machine`: a time or a memory, which a slow or busy machine misses too."""

    what: str
    aim: str
    found: str
    met: bool
    of_machine: bool = False


Campaign = Callable[[argparse.Namespace, Path], Sequence[Aim]]


def none_of(what: str, count: int, of: int) -> Aim:
    """An aim of zero."""
    return Aim(what, "0", f"{count:,} of {of:,}", count == 0)


def main_of(campaign: Campaign, description: Optional[str], add: Callable[[argparse.ArgumentParser], None]) -> int:
    """Run a campaign as a program; returns the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, metavar="NAME.mar", help="for this one [a tiny random classifier]")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    add(parser)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as name:
        os.environ.setdefault("XDG_STATE_HOME", f"{name}/state")
        found = campaign(options, Path(name))
    show(found, options.markdown)
    load = "/".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{time.monotonic() - started:.0f} s, {os.cpu_count()} cores, load {load}")
    return int(not all(aim.met for aim in found))


def show(found: Sequence[Aim], markdown: bool = False) -> None:
    """Print the table."""
    rows = [(each.what, each.aim, each.found, "yes" if each.met else "NO") for each in found]
    if markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in [("", "aim", "found", "met"), ("---",) * 4, *rows]))
        return
    table = Table("", "aim", "found", "met")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def tiny_config(folder: Path) -> Path:
    """Write a setup_config.json for a tiny random classifier beside its checkpoint; returns it."""
    checkpoint = models.make(folder / "checkpoint", "bert", "AutoModelForSequenceClassification", **LABELS)
    config = folder / "setup_config.json"
    config.write_text(json.dumps({"model_name": str(checkpoint), "max_length": 32, "dtype": "float32"}))
    return config


def archive_of(options: argparse.Namespace, folder: Path) -> Path:
    """Return the chosen archive, or build the tiny one, tiny.mar."""
    if options.archive is not None:
        return Path(options.archive).resolve()
    command = [*TRACESERVE, "build", "--config", str(tiny_config(folder)), "--output", str(folder / "tiny")]
    subprocess.run([*command, "--store", str(folder / "store")], check=True, stdout=subprocess.DEVNULL)
    return folder / "store" / "tiny.mar"


@contextlib.contextmanager
def serving(archive: Path, queue: int = 1000) -> Iterator[Instance]:
    """Serve an archive with one worker on the loopback address."""
    port = configuration.free_ports(1)[0]
    instance = server.start([archive], port=port, workers=1, timeout=_STARTING, front=FrontendOptions(queue=queue))
    try:
        yield instance
    finally:
        instances.stop(instance, at_once=True)


def answer_to(instance: Instance, text: str, timeout: float = 60.0) -> object:
    """Ask the served archive one text."""
    return client.predict(instance.address, instance.names[0], {"text": text}, timeout)
