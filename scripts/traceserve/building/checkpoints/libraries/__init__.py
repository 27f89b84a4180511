"""One file per library that loads checkpoints: `load(config, checkpoint)`.

It gives the model in float32 and eval mode, or says why it cannot. The model is called as one of transformers is, by keyword,
and has a `config` and where it writes a `generation_config` and `generate` as these have: so everything after it sees one
kind of model. What each library can load is its row in `config.libraries`.
"""

from __future__ import annotations

from typing import Any, Callable, Dict

from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.libraries import curated_transformers, transformers
from traceserve.building.config.setup_config import SetupConfig

LOADERS: Dict[str, Callable[[SetupConfig, Checkpoint], Any]] = {
    "transformers": transformers.load,
    "curated_transformers": curated_transformers.load,
}
