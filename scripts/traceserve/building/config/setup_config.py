"""setup_config.json's keys: defaults, limits, and older names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from traceserve_runtime.manifest import DEFAULT_VERSION, VERSION
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.texts.tokenization import LONG_INPUTS
from typing_extensions import Literal

from traceserve.building.config import dtypes, task_names
from traceserve.building.config.hardware import HARDWARE
from traceserve.building.config.libraries import LIBRARIES
from traceserve.building.config.save_modes import SAVE_MODES

AUTO_TASK = "auto"  # until the checkpoint is available
GGUF_FILE = r"^\w[\w .+()-]*(/\w[\w .+()-]*)*\.gguf$"  # a path within the checkpoint


class SetupConfig(BaseModel):
    """What to export, and how. Numbers and booleans may also be strings."""

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
        description="A GGUF file in the checkpoint that provides everything: configuration, tokenizer and weights. For "
        "text_generation",
    )
    library: Literal[tuple(LIBRARIES)] = Field(  # type: ignore[valid-type]  # only the table lists them
        "transformers",
        description="The checkpoint's loader. `curated_transformers` has models for feature_extraction and text_generation",
    )
    trust_remote_code: bool = Field(False, description="Run the checkpoint's own Python code; recorded in the archive")
    task: Literal[(AUTO_TASK, *TASKS)] = Field(  # type: ignore[valid-type]  # only the table lists tasks
        AUTO_TASK,
        description="The task; the older name of this key is `mode`. `auto`: the one that the checkpoint was trained for, by "
        "the `architectures` in its config.json, its other files and its weights; if several are possible, the build "
        "names them and stops. A pipeline's name (`ner`, `text-classification`) is accepted too",
    )
    save_mode: Literal[(dtypes.AUTO, *SAVE_MODES)] = Field(  # type: ignore[valid-type]  # likewise
        "torchscript",
        description="How the model is stored. `auto`: `openvino` in int8 on x86 (if that is asked for, or on a processor with "
        "VNNI or AMX and without bfloat16; its packages installed), else `torchscript`; by a rule, not by measuring",
    )
    dtype: Literal[(dtypes.AUTO, *dtypes.DTYPES)] = Field(  # type: ignore[valid-type]  # likewise
        dtypes.AUTO,
        description="The model's dtype. `auto`: the fastest on this processor that passes the gate, by a rule",
    )
    hardware: Literal[tuple(HARDWARE)] = Field(  # type: ignore[valid-type]  # likewise
        "cpu", description="The hardware that runs the archive; one for `gpu` runs on a CPU too"
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
        description="`auto`: any length up to max_length, if the trace is proven valid; `fixed`: every row is padded "
        "to max_length; or a list of lengths to pad to, the last of which is max_length",
    )
    long_inputs: Optional[Literal[LONG_INPUTS]] = Field(  # type: ignore[valid-type]  # the runtime's table
        None,
        description="How a text longer than max_length is handled, unless its request says otherwise; the default is "
        "`window` if the task can merge windows, else `reject`",
    )
    parameters: Dict[Any, Any] = Field(  # of strings; as Dict[str, Any] they would be stripped, and " top_k" be top_k
        {}, description="This archive's defaults for request parameters, as `traceserve tasks` lists them"
    )
    max_rows: int = Field(
        256,
        ge=1,
        description="The most rows (windows of all its texts) per HTTP request; a quarter of them, or 64 if "
        "that is more, may have the full max_length",
    )
    num_labels: Optional[int] = Field(
        None,
        ge=0,
        description="Checked against the model's head, if given; 0, the pytorch/serve example's value, is not",
    )
    index_to_name: Optional[str] = Field(
        None, description='A JSON file with the labels\' names (relative to this file): `{"0": "name", ...}`'
    )
    do_lower_case: Optional[bool] = Field(
        None,
        description="Whether the tokenizer lowers a text's case, for a checkpoint with only a `vocab.txt`; if its own "
        "files set it, they must agree",
    )
    allow_untrained_head: bool = Field(
        False, description="Serve a checkpoint without a head for the task with a random one; for trials only"
    )
    batch_size: int = Field(
        64,
        ge=1,
        le=4096,
        description="The most requests that the host (TorchServe, Ray Serve, ...) passes to the worker at once",
    )
    max_batch_delay: int = Field(
        1, ge=1, le=10_000, description="How long the host waits for a batch to fill, in milliseconds"
    )
    version: str = Field(
        DEFAULT_VERSION,
        pattern=VERSION,
        description="The archive's version, in its URL `/predictions/NAME/VERSION`; with another one, a second build can be "
        "registered beside the first",
    )
    response_timeout: int = Field(
        300,
        ge=1,
        le=86_400,
        description="Seconds after which TorchServe abandons a batch and restarts its worker; Ray Serve and uvicorn answer 503",
    )
    client_timeout: Optional[int] = Field(
        None,
        ge=1,
        le=86_400_000,
        description="Milliseconds after which TorchServe drops a request: if it still waits for the worker, it is not "
        "computed, and **no answer is sent, not even an error**, even to a waiting client. `null`: never",
    )

    continuous_batching: bool = Field(
        False,
        description="Whether requests join and leave TorchServe's running batch, between the tokens of texts that are written, "
        "or between turns of a tenth of a second: short requests no longer wait for long ones "
        "(docs/requests.md#requests-that-join-others). With one worker only. (On Ray Serve and uvicorn they always do)",
    )

    pack_weights: Optional[bool] = Field(
        None,
        description="Whether a worker keeps its own copy of the linear layers' weights, as its processor reads them, which is "
        "faster; in `torchscript` on a CPU. `null`: if it is the only worker",
    )
    explain_seconds: Optional[int] = Field(
        None,
        ge=1,
        le=86_400,
        description="The most seconds that an explanation may take, half of `response_timeout` at most. `null`: 30",
    )
    captum_explanation: Optional[bool] = Field(
        None,
        description="Whether the archive has the model's gradients, by which answers are explained, as captum's "
        "LayerIntegratedGradients does; in `torchscript` they take some 230 KiB. `null`: where the task, save mode and dtype "
        "have them; without them, answers are explained by hiding words",
    )
    embedding_name: Optional[str] = Field(
        None,
        description="The model's word embeddings, or a part of it that holds them, as in the pytorch/serve example; only "
        "checked, with captum_explanation: the model itself says which they are",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_confusion(cls, value: object, info: ValidationInfo) -> object:
        """Reject true for 1 and 1 for true, which pydantic accepts."""
        kind = cls.model_fields[str(info.field_name)].annotation
        is_switch = kind in (bool, Optional[bool])
        if isinstance(value, bool) and not is_switch:
            raise ValueError("should be an integer or a string, not a boolean")
        if is_switch and not isinstance(value, (bool, str)) and not (value is None and kind is not bool):
            raise ValueError("should be a boolean, true or false")
        return value

    @field_validator("task", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        """Return the task for a pipeline's name."""
        return task_names.ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("sequence_lengths", mode="after")
    @classmethod
    def _lengths(cls, value: object) -> object:
        if isinstance(value, list) and (not value or value != sorted(set(value)) or value[0] < 4):
            raise ValueError("should be an ascending list of lengths of 4 or more")
        return value


# Keys that mean in the pytorch/serve example what they mean here.
OF_EXPLANATIONS = ("captum_explanation", "embedding_name")
# Keys of the pytorch/serve example with another name here.
RENAMED = {"mode": "task"}
# Keys of the pytorch/serve example without meaning here, and why.
WITHOUT_MEANING = {
    "BetterTransformer": "transformers' own attention is as fast since torch 2",
    "FasterTransformer": "NVIDIA has abandoned it, and transformers' own attention is as fast since torch 2",
    "model_parallel": "a model runs on one device; more workers use more devices",
}


def default_name(config: SetupConfig, folder: Path) -> str:
    """Return the artifact's default name: the last part of `model_name`, or of the folder that it resolves to."""
    name = config.model_name.replace("\\", "/").rstrip("/").replace(":", "/").rsplit("/", 1)[-1]
    return checkpoint_folder(config, folder).resolve().name if name in ("", ".", "..", "~") else name


def checkpoint_folder(config: SetupConfig, folder: Path) -> Path:
    """Return the folder that `model_name` names, relative to the configuration's `folder`; it may not exist."""
    return folder / os.path.expanduser(config.model_name)
