"""Descriptions of the tasks: their inputs, parameters and answers."""

from __future__ import annotations

import json
from typing import List, NamedTuple, Sequence, Type

from traceserve_runtime.tasks import TASKS, explained
from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.tasks.parameters import Parameter

from traceserve.serving.curl import curl

NAME = "NAME"  # stands for the archive's in an example


class Entry(NamedTuple):
    """The description of a task."""

    name: str
    answer: str
    model: str  # the transformers class that loads its checkpoints
    fields: List[List[str]]  # name, kind, description
    parameters: List[List[str]]  # name, legal values, default, description
    explained_by: List[List[str]]  # likewise, of an explanation; none where answers are not explained
    example: str  # a curl command


def task_entries() -> List[Entry]:
    """Return all tasks, in the order of their table."""
    return [_entry(task) for task in TASKS.values()]


def markdown() -> str:
    """Return the descriptions of all tasks as Markdown."""
    general = TASKS["sequence_classification"].all_parameters()[-1]
    parts = [_section(entry) for entry in task_entries()]
    return "\n\n".join(parts) + f"\n\nEvery task takes `{general.name}` too: {general.description}.\n"


def _entry(task: Type[Task]) -> Entry:
    kinds = {"text": "a string", "texts": "a list of strings", "messages": "a list of objects"}
    return Entry(
        name=task.name,
        answer=" ".join((task.__doc__ or "").split()),
        model=task.auto_model,
        fields=[
            [field.name, kinds[field.kind] + ("" if field.required else ", optional"), field.description]
            for field in task.fields
        ],
        parameters=_rows(task.parameters),
        explained_by=[] if task.explains is None else _rows((*task.explains, *explained.PARAMETERS)),
        example=curl(f"http://127.0.0.1:8080/predictions/{NAME}", task.sample_body({})),
    )


def _rows(parameters: Sequence[Parameter]) -> List[List[str]]:
    return [[p.name, p.legal, _default(p), p.description] for p in parameters]


def _default(parameter: Parameter) -> str:
    return "-" if parameter.default is None else json.dumps(parameter.default)


def _section(entry: Entry) -> str:
    lines = [f"### {entry.name}", "", f"{entry.answer} Checkpoints: `{entry.model}`.", ""]
    lines += ["| field | | |", "|---|---|---|"]
    lines += [f"| `{name}` | {what} | {text} |" for name, what, text in entry.fields]
    for title, parameters in (("parameter", entry.parameters), ("of an explanation", entry.explained_by)):
        if parameters:
            lines += ["", f"| {title} | | default | |", "|---|---|---|---|"]
            lines += [f"| `{name}` | {legal} | `{default}` | {text} |" for name, legal, default, text in parameters]
    return "\n".join([*lines, "", "```", entry.example, "```"])
