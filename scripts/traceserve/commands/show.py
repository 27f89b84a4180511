"""tasks, formats, config-schema: what is available."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Sequence

from traceserve_runtime.errors import TraceserveError

from traceserve.commands.arguments import add_nothing
from traceserve.commands.contract import Command
from traceserve.commands.printing import console, print_line

if TYPE_CHECKING:
    from traceserve.building.config.formats import Format
    from traceserve.commands.catalog import Entry


def _config_schema(options: argparse.Namespace) -> int:
    from traceserve.building.config import schema

    print(json.dumps(schema.json_schema(), indent=2))
    return 0


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", metavar="TASK", help="show only this one [all]")
    parser.add_argument("--markdown", action="store_true", help="as Markdown")


def _tasks(options: argparse.Namespace) -> int:
    from traceserve.building.config.task_names import ALIASES
    from traceserve.commands import catalog

    if options.markdown:
        print(catalog.markdown(), end="")
        return 0
    named = ALIASES.get(options.task, options.task)
    found = [entry for entry in catalog.task_entries() if named in (None, entry.name)]
    if not found:
        raise TraceserveError(
            f"there is no task {options.task}, but: {', '.join(entry.name for entry in catalog.task_entries())}"
        )
    _print_tasks(found)
    return 0


def _add_formats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _formats(options: argparse.Namespace) -> int:
    from traceserve.building.config import formats

    if options.json:
        print(json.dumps(formats.formats_document(), indent=2))
    else:
        _print_formats(list(formats.every_format()))
    return 0


def _print_tasks(entries: Sequence[Entry]) -> None:
    """Print each task with its fields and parameters, and a command to copy."""
    from rich.table import Table
    from rich.text import Text

    screen = console()
    for entry in entries:
        screen.print(Text.assemble((entry.name, "bold"), "  ", (entry.model, "dim")), highlight=False)
        screen.print(f"  {entry.answer}", highlight=False)
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        table.add_column(no_wrap=True)
        for header in ("", "default", ""):
            table.add_column(header, overflow="fold")
        for name, what, text in entry.fields:
            table.add_row(Text(f"  {name}", "cyan"), what, "", text)
        for title, parameters in (("", entry.parameters), ("of an explanation:", entry.explained_by)):
            if title and parameters:
                table.add_row(Text(f"  {title}", "dim"))
            for name, legal, default, text in parameters:
                table.add_row(Text(f"  {name}", "green"), legal, default, text)
        screen.print(table, highlight=False)
        print_line(f"\n  {entry.example}\n")


def _print_formats(formats: Sequence[Format]) -> None:
    from rich.table import Table

    from traceserve.building.config.formats import options

    table = Table("save mode", "hardware", "tasks", "dtype", "why not others")
    every = {task for item in formats for task in item.tasks}
    for item in formats:
        tasks = "all" if set(item.tasks) == every else ", ".join(item.tasks)
        reasons = [f"{dtype}: {reason}" if dtype else reason for dtype, reason in item.refused.items()]
        table.add_row(item.save_mode, item.hardware, tasks, ", ".join(item.dtypes) or "-", "\n".join(reasons))
    own = Table("save mode", "hardware", "option", "", "default", "", title="options", title_justify="left")
    for column in (*table.columns, *own.columns):
        column.overflow = "fold"  # a narrow terminal wraps long names instead of dropping them
    for save_mode, hardware in dict.fromkeys((item.save_mode, item.hardware) for item in formats if item.dtypes):
        for option in options(save_mode, hardware).values():
            default = "-" if option.default is None else json.dumps(option.default)
            own.add_row(save_mode, hardware, option.name, option.legal, default, option.description)
    console().print(table, *([own] if own.row_count else []), highlight=False)


COMMANDS = (
    Command(
        "tasks",
        "Show the tasks: inputs, parameters, answers.",
        _add_tasks,
        _tasks,
    ),
    Command(
        "formats",
        "Show the valid combinations: save modes, hardware, dtypes and tasks.\n\nA save mode is how the model is stored in the "
        "archive, which decides what runs it in the worker. The keys save_mode,\nhardware, dtype and options of "
        "setup_config.json choose; invalid combinations are refused before anything is downloaded:\n\n"
        '  {"model_name": "...", "save_mode": "pretrained", "dtype": "float32", "options": {"torch_compile": true}}',
        _add_formats,
        _formats,
    ),
    Command(
        "config-schema",
        "Print the JSON schema of setup_config.json, for editors.",
        add_nothing,
        _config_schema,
    ),
)
