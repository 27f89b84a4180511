"""The JSON schema of setup_config.json, for editors."""

from __future__ import annotations

import itertools
from typing import Any, Dict, List, Mapping

from traceserve_runtime.tasks import TASKS
from traceserve_runtime.texts.tokenization import LONG_INPUTS

from traceserve.building.config import CONFIG_FILE, formats, libraries, task_names
from traceserve.building.config.hardware import FIXED_SHAPES, HARDWARE
from traceserve.building.config.libraries import LIBRARIES
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.building.config.setup_config import AUTO_TASK, RENAMED, WITHOUT_MEANING, SetupConfig


def json_schema() -> Dict[str, object]:
    """Return a JSON schema of setup_config.json, including legacy keys, for editors.

    It accepts everything that `parse` accepts, and what no schema can check: an out-of-range number written as a
    string, a list of lengths out of order or not ending at max_length, a part of a split GGUF file, among `parameters`
    2.0 for 2, and values that only a writer refuses.
    """
    schema = SetupConfig.model_json_schema()
    schema.update({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": CONFIG_FILE})
    properties: Dict[str, Any] = {key: _or_string(item) for key, item in schema["properties"].items()}
    properties["model_name"]["pattern"] = r"\S"
    properties["$schema"] = {"type": "string"}
    for old, new in RENAMED.items():
        properties[old] = {**properties[new], "description": f"The older name of {new}", "deprecated": True}
    for key, reason in WITHOUT_MEANING.items():
        properties[key] = {"description": f"Has no meaning here: {reason}", "deprecated": True}
    schema["properties"] = properties
    legal = {name: _legal_for(name) for name in TASKS}
    for name in ("task", *(old for old, new in RENAMED.items() if new == "task")):
        properties[name]["enum"] = [AUTO_TASK, *TASKS, *task_names.ALIASES]
    schema["allOf"] = [{"not": {"required": [old, new]}} for old, new in RENAMED.items()] + [
        {"if": _is("task", name), "then": then} for name, then in legal.items()
    ]
    schema["allOf"] += [{"if": _is("task", AUTO_TASK), "then": {"anyOf": list(legal.values())}}, *_options()]
    schema["allOf"] += [
        {"if": _is("library", name), "then": {"properties": {"save_mode": {"enum": list(library.save_modes)}}}}
        for name, library in LIBRARIES.items()
        if library.save_modes is not None
    ]
    return schema


def _is(key: str, value: str) -> Dict[str, object]:
    """Return the schema of a configuration with this value, under any name of the key, or by default."""
    keys = (key, *(old for old, new in RENAMED.items() if new == key))
    values = [value, *(name for name, meant in task_names.ALIASES.items() if key == "task" and meant == value)]
    named: List[Dict[str, object]] = [{"required": [name], "properties": {name: {"enum": values}}} for name in keys]
    if value == SetupConfig.model_fields[key].default:
        named.append({"not": {"anyOf": [{"required": [name]} for name in keys]}})
    return {"anyOf": named}


def _legal_for(task: str) -> Dict[str, object]:
    """Return `check_together`'s rules for this task, except for options."""
    kind = TASKS[task]
    schemas: List[Dict[str, object]] = [{"properties": _properties_for(task), **_with_gguf(task)}]
    if kind.loop:
        fixed = {"anyOf": [_is("hardware", name) for name in FIXED_SHAPES]}
        schemas.append({"if": {"not": fixed}, "then": {"properties": {"sequence_lengths": {"const": "auto"}}}})
    for item in formats.every_format():
        if task in item.tasks:
            legal = {"properties": {"dtype": {"enum": list(item.dtypes)}}} if item.dtypes else {"not": {}}
            both = [_is("save_mode", item.save_mode), _is("hardware", item.hardware)]
            schemas.append({"if": {"allOf": both}, "then": legal})
    return {"allOf": schemas}


def _properties_for(task: str) -> Dict[str, object]:
    kind = TASKS[task]
    parameters = {parameter.name: parameter.schema for parameter in kind.parameters}
    properties: Dict[str, object] = {"parameters": {"properties": parameters, "additionalProperties": False}}
    if not kind.labelled:
        properties["index_to_name"] = {"type": "null"}
    if not kind.merges_windows:
        properties["long_inputs"] = {"enum": [*LONG_INPUTS[1:], None]}
    properties["library"] = {"enum": libraries.legal(kind)}
    return properties


def _with_gguf(task: str) -> Dict[str, object]:
    """Return `check_library`'s rules with a GGUF file; without a library for it, none is allowed."""
    given = {"required": ["gguf_file"], "properties": {"gguf_file": {"type": "string"}}}
    reading = libraries.reading_gguf(TASKS[task])
    return {"if": given, "then": {"properties": {"library": {"enum": reading}}} if reading else False}


def _options() -> List[Dict[str, object]]:
    """Return `formats`'s rules for options of each save mode and hardware, as schemas."""
    schemas: List[Dict[str, object]] = []
    for save_mode, hardware in itertools.product(SAVE_MODES, HARDWARE):
        options = {name: item.schema for name, item in formats.options(save_mode, hardware).items()}
        legal: Dict[str, object] = {"options": {"properties": options, "additionalProperties": False}}
        both = [_is("save_mode", save_mode), _is("hardware", hardware)]
        schemas.append({"if": {"allOf": both}, "then": {"properties": legal}})
    return schemas


_INTEGER = {"type": "string", "pattern": r"^\s*[+-]?\d+(_\d+)*(\.0*)?\s*$"}
_BOOLEAN = {
    "type": "string",
    "pattern": r"^([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]|[Yy][Ee][Ss]|[Nn][Oo]|[Oo][Nn]|[Oo][Ff][Ff]|[TtFfYyNn01])$",
}


def _or_string(item: Mapping[str, Any]) -> Dict[str, Any]:
    """Allow a property's numbers and booleans, at any depth, to be strings too."""
    options = [dict(option) for option in item.get("anyOf", ())]
    notes = {key: item[key] for key in ("description", "title", "default") if key in item}
    options = options or [{key: value for key, value in item.items() if key not in notes}]
    for option in [*options]:
        if option.get("type") == "array":
            option.update(items={"anyOf": [{**option["items"], "minimum": 4}, _INTEGER]}, minItems=1, uniqueItems=True)
        elif option.get("type") in ("integer", "boolean"):
            options.append(_INTEGER if option["type"] == "integer" else _BOOLEAN)
    return {**notes, **(options[0] if len(options) == 1 else {"anyOf": options})}
