"""The libraries that load checkpoints: their tasks, save modes and GGUF support."""

from __future__ import annotations

import re
from typing import Dict, List, NamedTuple, Optional, Tuple, Type

from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import Task

from traceserve.errors import ConfigError


class Library(NamedTuple):
    """The capabilities of a library."""

    packages: Tuple[str, ...] = ()  # versions to record in the manifest, besides transformers'
    auto_models: Optional[Tuple[str, ...]] = None  # of the supported tasks; None: all
    save_modes: Optional[Tuple[str, ...]] = None  # in which its models can be written; None: all
    gguf_auto_models: Tuple[str, ...] = ()  # those that it reads from a GGUF file


ENCODES, WRITES = "AutoModel", "AutoModelForCausalLM"  # of encoders and of causal language models
GGUF_PACKAGES = ("gguf", "accelerate")  # transformers needs them for these files

LIBRARIES: Dict[str, Library] = {
    "transformers": Library(gguf_auto_models=(WRITES,)),
    "curated_transformers": Library(
        ("curated-transformers",), auto_models=(ENCODES, WRITES), save_modes=("torchscript",)
    ),
}


def legal(task: Type[Task]) -> List[str]:
    """Return the libraries with models for this task."""
    return [name for name, one in LIBRARIES.items() if one.auto_models is None or task.auto_model in one.auto_models]


def reading_gguf(task: Type[Task]) -> List[str]:
    """Return the libraries that read models for this task from GGUF files."""
    return [name for name, one in LIBRARIES.items() if task.auto_model in one.gguf_auto_models]


def check_library(library: str, task: Type[Task], save_mode: str, gguf_file: Optional[str]) -> None:
    """Raise ConfigError for invalid combinations, before anything is downloaded."""
    if library not in legal(task):
        raise ConfigError(
            f"library {library} has no models for the task {task.name}, but for "
            f"{', '.join(name for name, kind in TASKS.items() if library in legal(kind))}; take {' or '.join(legal(task))}"
        )
    written = LIBRARIES[library].save_modes
    if written is not None and save_mode not in written:
        raise ConfigError(
            f"save_mode {save_mode} is not for models of library {library}; take {' or '.join(written)}, or another library"
        )
    if gguf_file is None:
        return
    reading = reading_gguf(task)
    if not reading:
        raise ConfigError(f"gguf_file is for text generators, and not for the task {task.name}; remove it")
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", gguf_file):
        raise ConfigError(
            f"gguf_file {gguf_file} is a part of a file that was split; merge the parts (llama-gguf-split)"
        )
    if library not in reading:
        raise ConfigError(f"library {library} reads no GGUF files; with gguf_file take {' or '.join(reading)}")


def packages(library: str, gguf_file: Optional[str]) -> Tuple[str, ...]:
    """Return the packages that load a checkpoint, besides transformers."""
    return LIBRARIES[library].packages + (GGUF_PACKAGES if gguf_file else ())
