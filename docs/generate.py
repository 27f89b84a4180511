"""Writes docs/reference/ from the code: `python docs/generate.py`, or `--check` to only compare.

A test runs it with `--check`, so the reference cannot differ from what runs.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Type

import yaml
from traceserve import api
from traceserve import errors as builder_errors
from traceserve.building.config import formats
from traceserve.building.config.setup_config import SetupConfig
from traceserve.commands import COMMANDS, catalog
from traceserve.commands.contract import Command
from traceserve.serving import configuration
from traceserve_runtime import errors as runtime_errors
from traceserve_runtime import manifest
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.protocols import PROTOCOLS

FOLDER = Path(__file__).parent / "reference"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    check = parser.parse_args().check
    pages = {name: make() for name, make in PAGES.items()}
    stale = [name for name, text in pages.items() if not _is_current(FOLDER / name, text)]
    for name in [] if check else stale:
        (FOLDER / name).write_text(pages[name], encoding="utf-8")
    if stale:
        print(f"{'differ from the code' if check else 'written'}: {', '.join(stale)}")
    return int(check and bool(stale))


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def commands() -> str:
    """Return the page of all commands, with their options."""
    parts = [
        _opening("Commands", "scripts/traceserve/commands/"),
        "Exit codes: 0; 1 for a reported error, or for what a command was asked to find; 2 for a wrong call; 130 if interrupted.",
        *(_command(command) for command in COMMANDS),
    ]
    return _page(parts)


def _command(command: Command) -> str:
    parser = argparse.ArgumentParser(prog=f"traceserve {command.name}", add_help=False)
    command.add(parser)
    actions = parser._actions  # argparse has no public list
    positional = [action for action in actions if not action.option_strings]
    named = [action for action in actions if action.option_strings]
    usage = " ".join([f"traceserve {command.name}", *map(_argument, positional), *(["[OPTIONS]"] if named else [])])
    lines = [f"## traceserve {command.name}", "", f"    {usage}", "", _prose(command.text)]
    if actions:
        rows = [(f"`{_argument(action)}`", _help(action)) for action in (*positional, *named)]
        lines += ["", *_table(("argument", "meaning"), rows)]
    return "\n".join(lines)


def _argument(action: argparse.Action) -> str:
    """Return how an argument is written on the command line."""
    if action.option_strings:
        names = ", ".join(action.option_strings)
        return names if action.nargs == 0 else f"{names} {_value(action)}"
    name = _value(action)
    return {"*": f"[{name} ...]", "+": f"{name} ...", "?": f"[{name}]"}.get(str(action.nargs), name)


def _value(action: argparse.Action) -> str:
    if action.metavar:
        shown = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
        return f"[{shown}]" if action.nargs == "?" and action.option_strings else shown
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def _help(action: argparse.Action) -> str:
    return (action.help or "") % {"default": action.default}


def _prose(text: str) -> str:
    """Return a command's description as Markdown: indented lines are code."""
    return "\n".join(f"    {line.strip()}" if line.startswith("  ") else line for line in text.split("\n"))


def setup_config() -> str:
    """Return the page of setup_config.json's keys."""
    rows = []
    for key, field in SetupConfig.model_fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        rows.append((f"`{key}`", default, field.description or ""))
    parts = [
        _opening("setup_config.json", "scripts/traceserve/building/config/setup_config.py"),
        "`traceserve config-schema` prints a JSON schema for editors. Unknown keys are refused with the nearest known one.",
        "\n".join(_table(("key", "default", "meaning"), rows)),
        "A file written for pytorch/serve's Huggingface_Transformers example is accepted unchanged (`mode`, numbers as "
        "strings, ...), and so is its `model-config.yaml` (`--config model-config.yaml`); keys without meaning here are "
        "named, with the reason. With such a configuration the example's `index_to_name.json` is found by its location: "
        "beside it, or in the example's folder for the task.",
    ]
    return _page(parts)


def tasks() -> str:
    """Return the page of all tasks: inputs, parameters, answers."""
    return _page(
        [
            _opening("Tasks", "handlers/traceserve_runtime/tasks/"),
            "`traceserve tasks` prints this too. Defaults in a checkpoint's own files (a sentence encoder's pooling, a "
            "`generation_config.json`) override these, and `parameters` in `setup_config.json` override both.",
            catalog.markdown().replace("\n### ", "\n## ").replace("### ", "## ", 1).rstrip(),
            "Generation takes the best token unless a request or the checkpoint enables sampling; transformers' own "
            "text-generation pipeline samples by default. Greedy and beam search write exactly `generate`'s tokens. "
            "Prompts of all lengths run in one batch, which finished texts leave.",
        ]
    )


def save_modes() -> str:
    """Return the page of all valid combinations, and each save mode's options."""
    every = list(formats.every_format())
    rows, own = [], []
    for item in every:
        reasons = [f"{dtype}: {reason}" if dtype else reason for dtype, reason in item.refused.items()]
        rows.append(
            (item.save_mode, item.hardware, ", ".join(item.tasks), ", ".join(item.dtypes) or "-", "; ".join(reasons))
        )
    for save_mode, hardware in dict.fromkeys((item.save_mode, item.hardware) for item in every if item.dtypes):
        for option in formats.options(save_mode, hardware).values():
            default = "-" if option.default is None else f"`{json.dumps(option.default)}`"
            own.append((save_mode, hardware, f"`{option.name}`", option.legal, default, option.description))
    parts = [
        _opening("Save modes, hardware, dtypes", "scripts/traceserve/building/config/"),
        "`traceserve formats` prints this too; `--json` for programs.",
        "\n".join(_table(("save mode", "hardware", "tasks", "dtypes", "why not others"), rows)),
        "## Options",
        "They stand under `options` in setup_config.json.",
        "\n".join(_table(("save mode", "hardware", "option", "values", "default", "meaning"), own)),
    ]
    return _page(parts)


def protocols() -> str:
    """Return the page of all paths behind an archive's name and version."""
    rows = []
    for path, protocol in PROTOCOLS.items():
        rows.append((f"`/{path}`", _first_line(type(protocol))))
    parts = [
        _opening("Paths", "handlers/traceserve_runtime/protocols/"),
        "On TorchServe they follow `/predictions/NAME/VERSION`. Other hosts (Ray Serve, uvicorn) have them at the root, "
        "too. [Clients](../clients.md) has what was tried with which client.",
        "\n".join(_table(("path", "answers"), rows)),
        "`/v2/models/NAME`, `/v1/models/NAME` and their `:predict`, `:explain`, `/infer`, `/explain`, `/ready` are read "
        "likewise.",
    ]
    return _page(parts)


def errors() -> str:
    """Return the page of all errors that are raised on purpose."""
    served = [kind for kind in _kinds(runtime_errors) if kind is not TraceserveError]
    parts = [
        _opening("Errors", "handlers/traceserve_runtime/errors.py, scripts/traceserve/errors.py"),
        'A served error is `{"error": {"type": ..., "message": ..., "field": ...}}`, in other protocols in their own format. '
        "TorchServe's frontend has errors of its own: [frontend](../frontend.md).",
        "## Answered, or raised while a worker loads",
        "\n".join(
            _table(("type", "status", "meaning"), [(f"`{k.__name__}`", str(k.status), _first_line(k)) for k in served])
        ),
        "## Printed by a command, which exits with 1 (`inspect`, `diff`, `verify`: 2)",
        "\n".join(
            _table(
                ("type", "meaning", "more"),
                [(f"`{k.__name__}`", _first_line(k), _link(k.page)) for k in _kinds(builder_errors)],
            )
        ),
    ]
    return _page(parts)


def _link(page: Optional[str]) -> str:
    """Return a link from a page of the reference."""
    return f"[{page}](../{page})" if page else ""


def _kinds(module: ModuleType) -> Iterator[Type[TraceserveError]]:
    for kind in vars(module).values():
        if inspect.isclass(kind) and issubclass(kind, TraceserveError) and kind.__module__ == module.__name__:
            yield kind


def _manifest() -> str:
    """Return the page of traceserve.json's keys."""
    parts = [
        _opening("traceserve.json", "handlers/traceserve_runtime/manifest.py"),
        "The interface between builder and worker; it lies in every archive. "
        + " ".join((manifest.__doc__ or "").split("\n\n")[1].split()),
    ]
    for kind in (manifest.Manifest, manifest.Shapes, manifest.TokenizerFacts, manifest.Source, manifest.Base):
        doc = " ".join((kind.__doc__ or "").split())
        parts += [f"## {kind.__name__}", doc, "\n".join(_table(("key", "type", "meaning"), _fields(kind)))]
    return _page(parts)


def _fields(kind: type) -> List[Tuple[str, str, str]]:
    """Return a dataclass's fields with their types and the comments behind them."""
    lines = inspect.getsource(kind).splitlines()
    body = ast.parse("\n".join(lines)).body[0]
    assert isinstance(body, ast.ClassDef)
    rows = []
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            _, _, comment = lines[node.lineno - 1].partition("  # ")
            rows.append((f"`{node.target.id}`", f"`{ast.unparse(node.annotation)}`", comment))
    return rows


_OF_METRICS = {
    "traceserve_requests_total": "requests",
    "traceserve_tokens_total": "tokens that the texts have",
    "traceserve_computed_tokens_total": "tokens that were computed, padding included",
    "traceserve_windows_total": "rows: windows of all texts",
    "traceserve_micro_batches_total": "runs of the model",
    "traceserve_model_seconds_total": "seconds in the model, of each request's batch",
    "traceserve_handler_seconds_total": "seconds in the handler, of each request's batch, the model included",
    "traceserve_errors_total": "failed requests by `reason`, the error's type",
    "traceserve_batch_seconds": "a batch's time in the handler",
    "traceserve_last_batch_padding_ratio": "the share of padding in the last batch, 0 to 1",
    "traceserve_last_batch_model_seconds": "the last batch's seconds in the model",
    "PredictionTime": "TorchServe's own: a batch's milliseconds in the handler",
}


def metrics() -> str:
    """Return the page of the worker's metrics."""
    kinds = yaml.safe_load(configuration.METRICS)["model_metrics"]
    rows = [(f"`{m['name']}`", kind, _OF_METRICS[m["name"]]) for kind, every in kinds.items() for m in every]
    parts = [
        _opening("Metrics", "scripts/traceserve/serving/configuration.py"),
        "In Prometheus' format, at the address that `traceserve status` shows, beside TorchServe's own. Counters are sums over "
        "requests; the labels name the model. `traceserve deploy` writes a Grafana dashboard and alerts on them.",
        "\n".join(_table(("metric", "type", "meaning"), rows)),
    ]
    return _page(parts)


def python_api() -> str:
    """Return the page of the Python API."""
    parts = [
        _opening("Python", "scripts/traceserve/api.py"),
        "For notebooks and scripts; the same functions are behind the commands.",
        '```\nimport traceserve\n\narchive = traceserve.build("demo:support-intents", max_length=128)\n'
        'model = traceserve.load(archive)  # or a path: "model_store/NAME.mar"\nmodel("Where is my parcel?")\n```',
        "[A notebook](../notebook.ipynb) goes through it.",
    ]
    for member in (api.build, api.load, api.BuiltArchive, api.LoadedArchive):
        parts += _member(f"traceserve.{member.__name__}", member)
    parts += _member("LoadedArchive()", api.LoadedArchive.__call__)
    parts += _member("LoadedArchive.explain", api.LoadedArchive.explain)
    return _page(parts)


def _member(name: str, member: Callable[..., object]) -> List[str]:
    """Return the heading, the signature (of a function) and the docstring of a part of the API."""
    text = inspect.getdoc(member) or ""
    signature = [] if inspect.isclass(member) else [_signature(name, member)]
    return [f"## {name}", *signature, "\n\n".join(_docstring_part(part) for part in text.split("\n\n"))]


def _signature(name: str, member: Callable[..., object]) -> str:
    """Return a function's signature as code, a line per parameter."""
    lines = [f"{name}("]
    for parameter in inspect.signature(member).parameters.values():
        default = (
            parameter.default if isinstance(parameter.default, (str, bool, type(None))) else str(parameter.default)
        )
        given = "" if parameter.default is parameter.empty else f" = {default!r}"
        if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        star = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        if parameter.name != "self":
            lines.append(f"    {star}{parameter.name}: {parameter.annotation}{given},")
    lines.append(f") -> {inspect.signature(member).return_annotation}")
    return "\n".join(f"    {line}" for line in lines)


def _docstring_part(part: str) -> str:
    """Return a paragraph of a docstring; a section ("Args:") as a list."""
    head, *lines = part.split("\n")
    if head not in ("Args:", "Raises:"):
        return part
    items: List[str] = []
    for line in inspect.cleandoc("\n".join(lines)).split("\n"):
        if line.startswith(" "):
            items[-1] += f" {line.strip()}"
        else:
            name, _, meaning = line.partition(": ")
            items.append(f"- `{name}`: {meaning}")
    return "\n".join([f"**{head[:-1]}**", "", *items])


def _opening(title: str, source: str) -> str:
    return f"# {title}\n\n<!-- written by docs/generate.py from {source} -->"


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> List[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]


def _first_line(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


PAGES: Dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "setup-config.md": setup_config,
    "tasks.md": tasks,
    "save-modes.md": save_modes,
    "protocols.md": protocols,
    "manifest.md": _manifest,
    "errors.md": errors,
    "metrics.md": metrics,
    "python.md": python_api,
}

if __name__ == "__main__":
    sys.exit(main())
