"""What a library is: what loads a checkpoint, so that everything after it sees one kind of model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Tuple

if TYPE_CHECKING:
    from traceserve.building.checkpoints.sources import Checkpoint
    from traceserve.building.config.setup_config import SetupConfig


class Library(NamedTuple):
    """How a library loads: `load(config, checkpoint)` gives the model in float32 and eval mode, or says why it cannot.

    The model is called as one of transformers is, by keyword, and has a `config` and where it writes a
    `generation_config` and `generate` as these have.
    """

    load: Callable[[SetupConfig, Checkpoint], Any]
    packages: Tuple[str, ...] = ()  # whose versions the manifest records, beside transformers'
    auto_models: Optional[Tuple[str, ...]] = None  # of the tasks that it has models for; None: of all
    save_modes: Optional[Tuple[str, ...]] = None  # in which its models can be written; None: in all
    gguf_auto_models: Tuple[str, ...] = ()  # of those that it reads from a GGUF file
