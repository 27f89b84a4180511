"""A first setup_config.json, from what a checkpoint says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints import heads, lengths, sources
from traceserve.building.checkpoints.head_weights import empty
from traceserve.building.checkpoints.tokenizers import load_tokenizer
from traceserve.building.config.parsing import parse_config
from traceserve.building.config.setup_config import AUTO_TASK


@dataclass(frozen=True)
class Proposal:
    """The keys to write, and what was found: the evidence for the task (empty if it was given), the labels, a request
    body."""

    keys: Dict[str, Any]
    evidence: str
    labels: Tuple[str, ...]
    sample: Any
    notes: Optional[str]


def propose(model_name: str, folder: Path, task: str = AUTO_TASK) -> Proposal:
    """Return a configuration in `folder` for a checkpoint, which is downloaded if needed; raises SourceError,
    AmbiguousTask, ConfigError."""
    config, _ = parse_config({"model_name": model_name, "task": task})
    checkpoint = sources.fetch_checkpoint(config, folder)
    kind = TASKS[checkpoint.task]
    settled = config.model_copy(update={"task": checkpoint.task})
    keys = {"model_name": model_name, "task": checkpoint.task, "save_mode": settled.save_mode}
    model = empty(kind.auto_model, settled, checkpoint.folder)
    if model is not None:  # else the build will say what is wrong with it
        keys["max_length"] = lengths.max_length(settled, checkpoint, model, load_tokenizer(settled, checkpoint))
    facts = checkpoint.read_object("config.json")
    labels = tuple(heads.label_names(facts)) if kind.labelled and isinstance(facts, dict) else ()
    return Proposal(keys, checkpoint.task_found, labels, kind.sample_body({}), checkpoint.note)
