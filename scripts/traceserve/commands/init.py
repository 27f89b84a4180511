"""init: a first setup_config.json."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from traceserve.commands.contract import Command
from traceserve.commands.printing import console, printable, printable_json
from traceserve.errors import AmbiguousTask, ConfigError, some

if TYPE_CHECKING:
    from traceserve.building.proposal import Proposal


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a hub id or a folder [asked for]")
    parser.add_argument(
        "--task", metavar="T", default="auto", help="the task, if the checkpoint does not say it [auto]"
    )
    parser.add_argument(
        *("--output", "-o"),
        type=Path,
        metavar="FILE",
        default=Path("setup_config.json"),
        help="the file to write [setup_config.json]",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing one")


def _init(options: argparse.Namespace) -> int:
    from traceserve.archives import staging

    output: Path = options.output
    if output.exists() and not options.force:
        raise ConfigError(f"{output} exists; --force replaces it, --output names another one")
    named = options.checkpoint or _asked()
    folder = output.resolve().parent
    if Path(named).is_dir() and not Path(named).is_absolute() and not named.startswith("~"):
        named = os.path.relpath(Path(named).resolve(), folder)  # paths are relative to the configuration
    found = _proposal(named, folder, options.task)
    folder.mkdir(parents=True, exist_ok=True)
    staging.write_whole(output, json.dumps(found.keys, indent=2, ensure_ascii=False) + "\n")
    _print_proposal(found, output)
    return 0


def _asked() -> str:
    if not sys.stdin.isatty():
        raise ConfigError("name a checkpoint: traceserve init CHECKPOINT, a hub id or a folder")
    from rich.prompt import Prompt

    return Prompt.ask("checkpoint (a hub id or a folder)", console=console())


def _proposal(named: str, folder: Path, task: str) -> Proposal:
    """Return what the checkpoint says; where several tasks fit, somebody at a terminal is asked which."""
    from traceserve.building.proposal import propose

    try:
        return propose(named, folder, task)
    except AmbiguousTask as error:
        if not sys.stdin.isatty():
            raise ConfigError(f"{error.message}, or here: --task {error.tasks[0]}") from None
        from rich.prompt import Prompt

        chosen = Prompt.ask("several tasks fit; which", choices=list(error.tasks), console=console())
        return propose(named, folder, chosen)


def _print_proposal(found: Proposal, output: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    evidence = f" ({found.evidence})" if found.evidence else ""
    table.add_row("written", Text(str(output)))
    table.add_row("task", Text(printable(f"{found.keys['task']}{evidence}")))
    if "max_length" in found.keys:
        table.add_row("max_length", Text(f"{found.keys['max_length']} tokens"))
    if found.labels:
        table.add_row(f"{len(found.labels)} labels", Text(printable(some(found.labels))))
    table.add_row("a request", Text(printable_json(found.sample)))
    screen = console()
    screen.print(table, highlight=False)
    if found.notes:
        screen.print(found.notes, highlight=False, markup=False)
    config = "" if output == Path("setup_config.json") else f" --config {output}"
    screen.print(f"\nnext:  traceserve build{config}", highlight=False, markup=False)


COMMANDS = (
    Command(
        "init",
        "Write a setup_config.json from what a checkpoint says.\n\nFinds the task, the longest text and the labels; a "
        "hub's checkpoint is downloaded. Asks nothing when not on a terminal.\n\n"
        "  traceserve init distilbert/distilbert-base-uncased-finetuned-sst-2-english",
        _add_init,
        _init,
    ),
)
