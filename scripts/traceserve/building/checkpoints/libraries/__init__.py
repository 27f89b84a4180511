"""One file per library that loads checkpoints: `load(config, checkpoint)`.

It returns the model in float32 and eval mode, and a note on weights that it does not read, or raises. The model is
called like a transformers model, by keyword, and has its `config` and, if it writes, its `generation_config` and
`generate`, so later steps see one kind of model. `config.libraries` has a row per library with what it can load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, Optional, Tuple

from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.libraries import curated_transformers, transformers
from traceserve.building.config.setup_config import SetupConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOADERS: Dict[str, Callable[[SetupConfig, Checkpoint], Tuple[PreTrainedModel, Optional[str]]]] = {
    "transformers": transformers.load,
    "curated_transformers": curated_transformers.load,
}
