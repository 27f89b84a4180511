"""init: a first setup_config.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

from traceserve.building.config import CONFIG_FILE
from traceserve.commands.arguments import require_no_folder
from traceserve.commands.contract import Command
from traceserve.commands.printing import console, is_terminal, print_line, printable, printable_json
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
        default=Path(CONFIG_FILE),
        help="the file to write [%(default)s]",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing one")


def _init(options: argparse.Namespace) -> int:
    from traceserve.archives import staging

    output: Path = options.output
    require_no_folder(output)
    staging.check_replaceable(output, options.force, ConfigError)
    named = options.checkpoint or _asked()
    folder = output.resolve().parent
    if Path(named).is_dir() and not Path(named).is_absolute() and not named.startswith("~"):
        place = Path(named).resolve()
        found = _proposal(str(place), folder, options.task)
        # Paths are relative to the configuration, whose folder does not exist yet.
        found = dataclasses.replace(found, keys={**found.keys, "model_name": os.path.relpath(place, folder)})
    else:
        found = _proposal(named, folder, options.task)
    staging.write_whole(output, json.dumps(found.keys, indent=2, ensure_ascii=False) + "\n")
    _print_proposal(found, output)
    return 0


def _asked() -> str:
    if not is_terminal(sys.stdin):
        raise ConfigError("name a checkpoint: traceserve init CHECKPOINT, a hub id or a folder")
    return _answer_to("checkpoint (a hub id or a folder)")


def _answer_to(question: str, choices: Optional[Sequence[str]] = None) -> str:
    """Ask until there is an answer; raises ConfigError if the input ends (Ctrl-D)."""
    from rich.prompt import Prompt

    try:
        while True:
            answer = Prompt.ask(question, choices=None if choices is None else list(choices)).strip()
            if answer:
                return answer
    except EOFError:
        print_line("")  # the question's line has no end
        raise ConfigError(f"no answer to: {question}; nothing was written") from None


def _proposal(named: str, folder: Path, task: str) -> Proposal:
    """Return what the checkpoint says; where several tasks fit, somebody at a terminal is asked which."""
    from traceserve.building.proposal import propose

    try:
        return propose(named, folder, task)
    except AmbiguousTask as error:
        if not is_terminal(sys.stdin):
            raise ConfigError(f"{error.message}, or here: --task {error.tasks[0]}") from None
        return propose(named, folder, _answer_to("several tasks fit; which", error.tasks))


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
    console().print(table, highlight=False)
    if found.notes:
        print_line(found.notes)
    config = "" if output == Path(CONFIG_FILE) else f" --config {shlex.quote(str(output))}"
    print_line(f"\nnext:  traceserve build{config}")


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
