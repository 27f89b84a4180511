"""setup_config.json to SetupConfig: every key, default, legacy name and error."""

from __future__ import annotations

import difflib
import itertools
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.parameters import LARGEST_NUMBER, Parameter
from traceserve_runtime.texts.tokenization import LONG_INPUTS
from typing_extensions import Literal

from traceserve.archives.archive import VERSION
from traceserve.building.checkpoints import libraries
from traceserve.building.checkpoints.libraries import LIBRARIES
from traceserve.building.config import config_files, formats, task_names
from traceserve.building.writers import WRITERS
from traceserve.building.writers.lowering import precision
from traceserve.errors import ConfigError

CONFIG_FILE = "setup_config.json"
AUTO_TASK = "auto"  # until the checkpoint is at hand
GGUF_FILE = r"^\w[\w .+()-]*(/\w[\w .+()-]*)*\.gguf$"  # a path within the checkpoint


class SetupConfig(BaseModel):
    """What to export and how. Numbers and booleans may also be written as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, protected_namespaces=())

    model_name: str = Field(
        min_length=1,
        description="The checkpoint: a hub id, a folder (relative to this file), `package:MODULE/PATH` for one inside "
        "an installed package, or `demo:support-intents`",
    )
    revision: Optional[str] = Field(None, description="The hub's branch, tag or commit; the default is its main branch")
    gguf_file: Optional[str] = Field(
        None,
        pattern=GGUF_FILE,
        description="A GGUF file in the checkpoint, which then is all of it: configuration, tokenizer and weights. For "
        "text_generation",
    )
    library: Literal[tuple(LIBRARIES)] = Field(  # type: ignore[valid-type]  # the table is the one place that lists them
        "transformers",
        description="What loads the checkpoint. `curated_transformers` has models for feature_extraction and text_generation",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the checkpoint; recorded in the archive"
    )
    task: Literal[(AUTO_TASK, *TASKS)] = Field(  # type: ignore[valid-type]  # the table is the one place that lists tasks
        AUTO_TASK,
        description="What is answered; the older name of this key is `mode`. `auto`: what the checkpoint was trained for, by "
        "the `architectures` in its config.json, its other files and its weights; where these leave several tasks, the build "
        "names them and stops. A pipeline's name (`ner`, `text-classification`) will do",
    )
    save_mode: Literal[tuple(WRITERS)] = Field(  # type: ignore[valid-type]  # likewise
        "torchscript", description="How the model is stored"
    )
    dtype: Literal[(precision.AUTO, *precision.PRECISIONS)] = Field(  # type: ignore[valid-type]  # likewise
        precision.AUTO,
        description="What the model computes in. `auto`: the fastest that this processor does by itself and that the gate "
        "lets through",
    )
    hardware: Literal[formats.HARDWARE] = Field(  # type: ignore[valid-type]  # what any writer lists
        "cpu", description="What the archive runs on; one for `gpu` runs on a CPU too"
    )
    options: Dict[Any, Any] = Field({}, description="Options of this save mode, as `traceserve formats` lists them")
    max_length: Optional[int] = Field(
        None,
        ge=4,
        le=1_000_000,
        description="The longest row in tokens, at most as many as the model has positions; the default is its and its "
        "tokenizer's limit, at most 512",
    )
    sequence_lengths: Union[Literal["auto", "fixed"], List[int]] = Field(
        "auto",
        description="`auto`: any length up to max_length, where the trace is proven to hold; `fixed`: every row is padded "
        "to max_length; or a list of lengths to pad to, the last of which is max_length",
    )
    long_inputs: Optional[Literal[LONG_INPUTS]] = Field(  # type: ignore[valid-type]  # the runtime's table
        None,
        description="What becomes of a text longer than max_length, unless its request says otherwise; the default is "
        "`window` where the task can merge windows, else `reject`",
    )
    parameters: Dict[Any, Any] = Field(  # of strings; as Dict[str, Any] they would be stripped, and " top_k" be top_k
        {}, description="This archive's own defaults for parameters of requests, as `traceserve tasks` lists them"
    )
    max_rows: int = Field(
        256,
        ge=1,
        description="The most rows (windows of all its texts) that one HTTP request may take; a quarter of them, or 64 where "
        "that is more, may be as long as max_length",
    )
    num_labels: Optional[int] = Field(
        None,
        ge=0,
        description="Checked against the model's head, where given; 0, as the pytorch/serve example has it, is not",
    )
    index_to_name: Optional[str] = Field(
        None, description='A JSON file with the labels\' names (relative to this file): `{"0": "name", ...}`'
    )
    do_lower_case: Optional[bool] = Field(
        None,
        description="Whether the tokenizer lowers a text's case, for a checkpoint with a `vocab.txt` alone; where its own "
        "files say it, they must agree",
    )
    allow_untrained_head: bool = Field(
        False, description="Serve a checkpoint without a head for the task with a random one; for trials only"
    )
    batch_size: int = Field(64, ge=1, le=4096, description="The most requests that TorchServe hands over at once")
    max_batch_delay: int = Field(
        1, ge=1, le=10_000, description="How long TorchServe waits for a batch to fill, in milliseconds"
    )
    version: str = Field(
        "1.0",
        pattern=VERSION,
        description="The archive's version, in its URL `/predictions/NAME/VERSION`; with another one a second build can be "
        "registered beside the first",
    )
    response_timeout: int = Field(
        300, ge=1, description="Seconds after which TorchServe gives up a batch and restarts its worker"
    )
    client_timeout: Optional[int] = Field(
        None,
        ge=1,
        le=86_400_000,
        description="Milliseconds after which TorchServe drops a request: one that still waits for the worker then is not "
        "computed, and **no answer is sent, not even an error**, to a client that is still there. `null`: never",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_confusion(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1, and 1 for true."""
        kind = cls.model_fields[str(info.field_name)].annotation
        is_switch = kind in (bool, Optional[bool])
        if isinstance(value, bool) and not is_switch:
            raise ValueError("should be an integer or a string, not a boolean")
        if is_switch and not isinstance(value, (bool, str)) and not (value is None and kind is not bool):
            raise ValueError("should be a boolean, true or false")
        return value

    @field_validator("task", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """The task that a pipeline's name means."""
        return task_names.ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("sequence_lengths", mode="after")
    @classmethod
    def _lengths(cls, value: Any) -> Any:
        if isinstance(value, list) and (not value or value != sorted(set(value)) or value[0] < 4):
            raise ValueError("should be an ascending list of lengths of 4 or more")
        return value


class Loaded(NamedTuple):
    """A configuration, the folder that its paths are relative to, and what the user should know about it."""

    config: SetupConfig
    folder: Path
    notes: Tuple[str, ...]


# Keys of the pytorch/serve example that have another name here.
RENAMED = {"mode": "task"}
# Keys of the pytorch/serve example that have no meaning any more, and why.
WITHOUT_MEANING = {
    "captum_explanation": "this version has no explanations; predictions are the same without",
    "embedding_name": "it belonged to captum_explanation",
    "BetterTransformer": "transformers' attention is as fast by itself since torch 2",
    "FasterTransformer": "NVIDIA has given it up, and transformers' attention is as fast by itself since torch 2",
    "model_parallel": "a model runs on one device; more workers use more devices",
}


def load(path: Path) -> Loaded:
    """Read and check a configuration file; raises ConfigError, which names the key and what would be legal."""
    content = config_files.read(path)
    folder = path.resolve().parent
    try:
        config, notes = parse(content.keys)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    notes = (*content.notes, *notes)
    beside = config_files.labels_beside(config.task, folder) if _is_the_examples(config, content.keys) else None
    if beside is not None:
        config = config.model_copy(update={"index_to_name": beside})
        notes += (f'{beside} names the labels, by its place; "index_to_name": null takes the checkpoint\'s own names',)
    return Loaded(config, folder, notes)


def _is_the_examples(config: SetupConfig, content: Mapping[str, Any]) -> bool:
    """Whether a configuration is the pytorch/serve example's, for which a file of labels has no key but a place."""
    labelled = config.task in TASKS and TASKS[config.task].labelled
    return labelled and "index_to_name" not in content and bool({*RENAMED, *WITHOUT_MEANING} & set(content))


def parse(content: Any) -> Tuple[SetupConfig, Tuple[str, ...]]:
    """The configuration that parsed JSON describes, and one note for each key without meaning."""
    if not isinstance(content, dict):
        raise ConfigError("the configuration should be a JSON object")
    content = {key: value for key, value in content.items() if key != "$schema"}
    notes = tuple(f"{key} has no meaning here: {WITHOUT_MEANING[key]}" for key in content if key in WITHOUT_MEANING)
    known: Dict[str, Any] = {}
    written = {RENAMED.get(key, key): key for key in content}
    for key, value in content.items():
        name = RENAMED.get(key, key)
        if name in known:
            old = next(old for old, new in RENAMED.items() if new == name)
            raise ConfigError(f"{old} and {name} are the same key; keep one")
        if name in SetupConfig.model_fields:
            known[name] = value
        elif key not in WITHOUT_MEANING:
            raise ConfigError(_unknown(key))
    try:
        config = SetupConfig.model_validate(known)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(item, written) for item in error.errors())) from None
    if config.task == AUTO_TASK:
        _check_any_task(config)
    else:
        check_together(config)
    return config, notes


def default_name(config: SetupConfig) -> str:
    """The artifact's name where none is asked for: the last part of `model_name`."""
    return config.model_name.replace("\\", "/").rstrip("/").replace(":", "/").rsplit("/", 1)[-1]


def json_schema() -> Dict[str, Any]:
    """A JSON schema of setup_config.json, legacy keys included, for editors.

    It accepts what `parse` accepts, and what no schema can tell: a number out of range that is written as a string, a
    list of lengths out of order, or one that does not end at max_length, a part of a GGUF file that is split, among
    `parameters` 2.0 for 2, and what a writer refuses by itself.
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


def _is(key: str, value: str) -> Dict[str, Any]:
    """The schema of a configuration with this value, under any name of the key, or by default."""
    keys = (key, *(old for old, new in RENAMED.items() if new == key))
    values = [value, *(name for name, meant in task_names.ALIASES.items() if key == "task" and meant == value)]
    named: List[Dict[str, Any]] = [{"required": [name], "properties": {name: {"enum": values}}} for name in keys]
    if value == SetupConfig.model_fields[key].default:
        named.append({"not": {"anyOf": [{"required": [name]} for name in keys]}})
    return {"anyOf": named}


def _legal_for(task: str) -> Dict[str, Any]:
    """What `check_together` asks of a configuration for this task, but for its options."""
    kind = TASKS[task]
    schemas: List[Dict[str, Any]] = [{"properties": _properties_for(task), **_with_gguf(task)}]
    if kind.loop:
        fixed = {"anyOf": [_is("hardware", name) for name in formats.FIXED_SHAPES]}
        schemas.append({"if": {"not": fixed}, "then": {"properties": {"sequence_lengths": {"const": "auto"}}}})
    for item in formats.every_format():
        if task in item.tasks:
            legal = {"properties": {"dtype": {"enum": list(item.dtypes)}}} if item.dtypes else {"not": {}}
            both = [_is("save_mode", item.save_mode), _is("hardware", item.hardware)]
            schemas.append({"if": {"allOf": both}, "then": legal})
    return {"allOf": schemas}


def _properties_for(task: str) -> Dict[str, Any]:
    kind = TASKS[task]
    parameters = {parameter.name: _parameter_schema(parameter) for parameter in kind.parameters}
    properties: Dict[str, Any] = {"parameters": {"properties": parameters, "additionalProperties": False}}
    if not kind.labelled:
        properties["index_to_name"] = {"type": "null"}
    if not kind.merges_windows:
        properties["long_inputs"] = {"enum": [*LONG_INPUTS[1:], None]}
    properties["library"] = {"enum": libraries.legal(kind)}
    return properties


def _with_gguf(task: str) -> Dict[str, Any]:
    """What `libraries.check` asks of a configuration with a GGUF file; without a library for it there is none to be."""
    given = {"required": ["gguf_file"], "properties": {"gguf_file": {"type": "string"}}}
    reading = libraries.reading_gguf(TASKS[task])
    return {"if": given, "then": {"properties": {"library": {"enum": reading}}} if reading else False}


def _options() -> List[Dict[str, Any]]:
    """What `formats` asks of the options of each save mode on each hardware, as schemas."""
    schemas: List[Dict[str, Any]] = []
    for save_mode, hardware in itertools.product(WRITERS, formats.HARDWARE):
        options = {name: _parameter_schema(item) for name, item in formats.options(save_mode, hardware).items()}
        legal: Dict[str, Any] = {"options": {"properties": options, "additionalProperties": False}}
        both = [_is("save_mode", save_mode), _is("hardware", hardware)]
        schemas.append({"if": {"allOf": both}, "then": {"properties": legal}})
    return schemas


def _parameter_schema(parameter: Parameter) -> Dict[str, Any]:
    """What `Parameter.accepts` accepts."""
    most = LARGEST_NUMBER if parameter.most is None else parameter.most
    text = {"type": "string", "minLength": 1}
    legal: Dict[type, List[Dict[str, Any]]] = {
        int: [{"type": "integer", "minimum": parameter.least, "maximum": most}],
        float: [{"type": "number", "minimum": parameter.least, "maximum": most}],
        bool: [{"type": "boolean"}],
        str: [] if parameter.choices else [{"type": "string"}],
        list: [text, {"type": "array", "items": text, "minItems": 1}],
    }
    if parameter.numbers:
        numbers = {"type": "integer", "minimum": parameter.least}
        legal[list] = [{"type": "array", "items": numbers, "minItems": 1}]
    options = legal[parameter.type]
    options += [{"enum": list(parameter.choices)}] if parameter.choices else []
    options += [{"type": "null"}] if parameter.nullable else []
    return {"description": parameter.description, **(options[0] if len(options) == 1 else {"anyOf": options})}


_INTEGER = {"type": "string", "pattern": r"^\s*[+-]?\d+(_\d+)*(\.0*)?\s*$"}
_BOOLEAN = {
    "type": "string",
    "pattern": r"^([Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]|[Yy][Ee][Ss]|[Nn][Oo]|[Oo][Nn]|[Oo][Ff][Ff]|[TtFfYyNn01])$",
}


def _or_string(item: Mapping[str, Any]) -> Dict[str, Any]:
    """A property whose numbers and booleans, at any depth, may be written as strings too."""
    options = [dict(option) for option in item.get("anyOf", ())]
    notes = {key: item[key] for key in ("description", "title", "default") if key in item}
    options = options or [{key: value for key, value in item.items() if key not in notes}]
    for option in [*options]:
        if option.get("type") == "array":
            option.update(items={"anyOf": [{**option["items"], "minimum": 4}, _INTEGER]}, minItems=1, uniqueItems=True)
        elif option.get("type") in ("integer", "boolean"):
            options.append(_INTEGER if option["type"] == "integer" else _BOOLEAN)
    return {**notes, **(options[0] if len(options) == 1 else {"anyOf": options})}


def _check_any_task(config: SetupConfig) -> None:
    """Refuse, before the task is known, what cannot work together for any."""
    refused = []
    for name in TASKS:
        try:
            check_together(config.model_copy(update={"task": name}))
            return
        except ConfigError as error:
            refused.append(error.message)
    alike = len(set(refused)) == 1
    raise ConfigError(refused[0] if alike else f"{refused[0]} (and no other task would do)")


def check_together(config: SetupConfig) -> None:
    """Refuse what cannot work together; before anything is downloaded, where the task is configured."""
    task = TASKS[config.task]
    refusals = (
        formats.refusal(config.save_mode, config.hardware, config.dtype, task),
        formats.refused_option(config.save_mode, config.hardware, config.options),
        WRITERS[config.save_mode].refuses(config),
    )
    for refusal in refusals:
        if refusal is not None:
            raise ConfigError(refusal)
    lengths = config.sequence_lengths
    if isinstance(lengths, list) and config.max_length not in (None, lengths[-1]):
        raise ConfigError(
            f"sequence_lengths ends at {lengths[-1]}, but max_length is {config.max_length}; they must agree"
        )
    libraries.check(config.library, task, config.save_mode, config.gguf_file)
    if task.loop and lengths != "auto" and config.hardware not in formats.FIXED_SHAPES:
        raise ConfigError(f"sequence_lengths has no meaning for {config.task}, whose texts grow token by token")
    if config.long_inputs == "window" and not task.merges_windows:
        raise ConfigError(f"long_inputs is window, but {config.task} cannot merge windows; use truncate or reject")
    known = {parameter.name: parameter for parameter in task.parameters}
    for name, value in config.parameters.items():
        if name not in known:
            raise ConfigError(f"parameters: {config.task} has no parameter {name}, but {', '.join(known) or 'none'}")
        if not known[name].accepts(value):
            raise ConfigError(f"parameters: {name} should be {known[name].legal}, not {json.dumps(value)}")
    if config.index_to_name is not None and not task.labelled:
        raise ConfigError(f"index_to_name has no meaning for the task {config.task}, which has no labels")


def _unknown(key: Any) -> str:
    key = str(key)
    known = [*SetupConfig.model_fields, *RENAMED, *WITHOUT_MEANING]
    near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(key.lower(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(SetupConfig.model_fields)}"
    return f"unknown key {key}; {hint}"


def _sentence(error: Mapping[str, Any], written: Mapping[str, str]) -> str:
    """One of pydantic's errors as a sentence: the key as the user wrote it, what was given, what would be legal."""
    key = str(error["loc"][0]) if error["loc"] else ""
    key = written.get(key, key)
    if error["type"] == "missing":
        return f"{key} is missing: {SetupConfig.model_fields[key].description}"
    if error["type"] == "dict_type":
        message = 'Should be an object, as {"name": value}; leave the key out where there is nothing to set'
    else:
        message = error["msg"].replace("Value error, ", "")
    more = task_names.advice(error["input"]) if RENAMED.get(key, key) == "task" else None
    message += f"; {more}" if more else ""
    return f"{key} is {json.dumps(error['input'], ensure_ascii=False, default=str)}: {message[0].lower() + message[1:]}"
