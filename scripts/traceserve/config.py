"""setup_config.json to SetupConfig: every key, default, legacy name and error."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from typing_extensions import Literal

from traceserve.errors import ConfigError
from traceserve.writers import WRITERS
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tokenization import LONG_INPUTS

CONFIG_FILE = "setup_config.json"


class SetupConfig(BaseModel):
    """What to export and how. Numbers and booleans may also be written as strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, protected_namespaces=())

    model_name: str = Field(
        min_length=1,
        description="The checkpoint: a hub id, a folder (relative to this file), `package:MODULE/PATH` for one inside "
        "an installed package, or `demo:support-intents`",
    )
    revision: Optional[str] = Field(None, description="The hub's branch, tag or commit; the default is its main branch")
    library: Literal["transformers"] = Field("transformers", description="What loads the checkpoint")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the checkpoint; recorded in the archive"
    )
    task: Literal[tuple(TASKS)] = Field(  # type: ignore[valid-type]  # the table is the one place that lists tasks
        "sequence_classification", description="What is answered; the older name of this key is `mode`"
    )
    save_mode: Literal[tuple(WRITERS)] = Field(  # type: ignore[valid-type]  # likewise
        "torchscript", description="How the model is stored"
    )
    hardware: Literal["cpu"] = Field("cpu", description="What the archive runs on")
    max_length: Optional[int] = Field(
        None, ge=4, le=1_000_000, description="The longest row in tokens; the default is the model's own limit, at most 512"
    )
    sequence_lengths: Union[Literal["auto", "fixed"], List[int]] = Field(
        "auto",
        description="`auto`: any length up to max_length, where the trace is proven to hold; `fixed`: every row is padded "
        "to max_length; or a list of lengths to pad to, the last of which is max_length",
    )
    long_inputs: Literal[LONG_INPUTS] = Field(  # type: ignore[valid-type]  # the runtime's table
        "window", description="What becomes of a text longer than max_length, unless its request says otherwise"
    )
    max_rows: int = Field(
        256, ge=1, description="The most rows (windows of all its texts) that one HTTP request may take"
    )
    num_labels: Optional[int] = Field(None, ge=1, description="Checked against the model's head, where given")
    index_to_name: Optional[str] = Field(
        None, description="A JSON file with the labels' names (relative to this file): `{\"0\": \"name\", ...}`"
    )
    allow_untrained_head: bool = Field(
        False, description="Serve a checkpoint without a head for the task with a random one; for trials only"
    )
    batch_size: int = Field(32, ge=1, le=4096, description="The most requests that TorchServe hands over at once")
    max_batch_delay: int = Field(
        2, ge=1, le=10_000, description="How long TorchServe waits for a batch to fill, in milliseconds"
    )
    response_timeout: int = Field(
        300, ge=1, description="Seconds after which TorchServe gives up a batch and restarts its worker"
    )

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
    "do_lower_case": "the checkpoint's own tokenizer decides, as it did in training",
    "captum_explanation": "this version has no explanations; predictions are the same without",
    "embedding_name": "it belonged to captum_explanation",
    "BetterTransformer": "transformers' attention is as fast by itself since torch 2",
    "FasterTransformer": "NVIDIA has given it up, and transformers' attention is as fast by itself since torch 2",
    "model_parallel": "a model runs on one device; more workers use more devices",
}


def load(path: Path) -> Loaded:
    """Read and check a configuration file; raises ConfigError, which names the key and what would be legal."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a configuration with --config FILE") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        config, notes = parse(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    return Loaded(config, path.resolve().parent, notes)


def parse(content: Any) -> Tuple[SetupConfig, Tuple[str, ...]]:
    """The configuration that parsed JSON describes, and one note for each key without meaning."""
    if not isinstance(content, dict):
        raise ConfigError("the configuration should be a JSON object")
    content = {key: value for key, value in content.items() if key != "$schema"}
    notes = tuple(f"{key} has no meaning here: {WITHOUT_MEANING[key]}" for key in content if key in WITHOUT_MEANING)
    known: Dict[str, Any] = {}
    for key, value in content.items():
        name = RENAMED.get(key, key)
        if name in known:
            raise ConfigError(f"{key} and {name} are the same key; keep one")
        if key in SetupConfig.model_fields or key in RENAMED:
            known[name] = value
        elif key not in WITHOUT_MEANING:
            raise ConfigError(_unknown(key))
    try:
        config = SetupConfig.model_validate(known)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(item) for item in error.errors())) from None
    _check_together(config)
    return config, notes


def default_name(config: SetupConfig) -> str:
    """The artifact's name where none is asked for: the last part of `model_name`."""
    return config.model_name.replace("\\", "/").rstrip("/").replace(":", "/").rsplit("/", 1)[-1]


def json_schema() -> Dict[str, Any]:
    """A JSON schema of setup_config.json, legacy keys included, for editors."""
    schema = SetupConfig.model_json_schema()
    schema.update({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": CONFIG_FILE})
    properties = schema["properties"]
    for item in properties.values():
        kinds = {option.get("type") for option in (item, *item.get("anyOf", ()))}
        if kinds & {"integer", "boolean", "number"}:
            item["anyOf"] = [*item.pop("anyOf", [_without_notes(item)]), {"type": "string"}]
            for key in [key for key in item if key not in ("anyOf", "description", "title", "default")]:
                del item[key]
    properties["$schema"] = {"type": "string"}
    for old, new in RENAMED.items():
        properties[old] = {**properties[new], "description": f"The older name of {new}", "deprecated": True}
    for key, reason in WITHOUT_MEANING.items():
        properties[key] = {"description": f"Has no meaning here: {reason}", "deprecated": True}
    return schema


def _check_together(config: SetupConfig) -> None:
    """Refuse, before anything is downloaded, what cannot work together."""
    writer = WRITERS[config.save_mode]
    if config.hardware not in writer.hardware:
        raise ConfigError(f"save_mode {config.save_mode} runs on {', '.join(writer.hardware)}, not on {config.hardware}")
    lengths = config.sequence_lengths
    if isinstance(lengths, list) and config.max_length not in (None, lengths[-1]):
        raise ConfigError(f"sequence_lengths ends at {lengths[-1]}, but max_length is {config.max_length}; they must agree")
    if config.index_to_name is not None and not TASKS[config.task].labelled:
        raise ConfigError(f"index_to_name has no meaning for the task {config.task}, which has no labels")


def _unknown(key: str) -> str:
    known = [*SetupConfig.model_fields, *RENAMED, *WITHOUT_MEANING]
    near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(key.lower(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(SetupConfig.model_fields)}"
    return f"unknown key {key}; {hint}"


def _sentence(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a sentence: the key, what was given, what would be legal."""
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "missing":
        return f"{key} is missing: {SetupConfig.model_fields[key].description}"
    message = error["msg"].replace("Value error, ", "")
    return f"{key} is {json.dumps(error['input'], ensure_ascii=False, default=str)}: {message[0].lower() + message[1:]}"


def _without_notes(item: Mapping[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("description", "title", "default")}


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"the key {key} is given twice")
    return dict(pairs)
