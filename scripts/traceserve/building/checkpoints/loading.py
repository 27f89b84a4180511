"""Loads a checkpoint's original model and tokenizer, in float32, for tracing and comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, Optional, Tuple

from traceserve_runtime.runtimes import pretrained
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import ModelFacts

from traceserve.building.checkpoints import (
    case,
    chat,
    conversion,
    generation,
    gguf,
    languages,
    sentence_transformers,
    short_rows,
    tokenizers,
)
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.labels import labels as checkpoint_labels
from traceserve.building.checkpoints.lengths import attend_to_all, max_length
from traceserve.building.checkpoints.libraries import LOADERS
from traceserve.building.checkpoints.lookups import id_of_token
from traceserve.building.checkpoints.original import ARRAYS_FILE, Original
from traceserve.building.checkpoints.sentence_transformers import Embedding
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PARALLEL = "TOKENIZERS_PARALLELISM"  # without it tokenizers warns where a process forks
# The inputs that the runtime makes, in positional order.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def load_original(config: SetupConfig, checkpoint: Checkpoint, config_folder: Path) -> Original:
    """Return the original model and tokenizer of a checkpoint, checked against `config`; raises errors that describe
    mismatches.

    The tokenizer is always transformers': the worker needs its tokenizer.json and special
    tokens, and the gate uses it. (The curated library's own are slow, or lack the special tokens' names.)
    """
    gguf.check_gguf(checkpoint)
    tokenizer = tokenizers.load_tokenizer(config, checkpoint)
    languages.set_language(config, tokenizer)
    model, weights_note = LOADERS[config.library](config, checkpoint)
    accepted = inspect.signature(model.forward).parameters
    inputs = tuple(name for name in INPUTS if name in accepted and name in tokenizer.model_input_names)
    if "attention_mask" in accepted and "attention_mask" not in inputs:
        inputs = tuple(name for name in INPUTS if name in (*inputs, "attention_mask"))
    if "input_ids" not in inputs:
        raise ExportError(f"{config.model_name} does not read text: its model takes {', '.join(accepted)}")
    task = TASKS[config.task]
    if task.loop:
        inputs = INPUTS[:2]
    case_note = case.check_case(config, tokenizer)
    case.follow_sentence_transformers(task, checkpoint, tokenizer)
    labels = checkpoint_labels(config, model, config_folder) if task.labelled else ()
    most = max_length(config, checkpoint, model, tokenizer)
    attend_to_all(model)
    shortest = 1 if task.loop else short_rows.shortest(model, tokenizer, inputs, most)
    embedding = sentence_transformers.read_modules(checkpoint) if task.reads_vectors else Embedding()
    settings = generation.settle_generation(model, task, config.parameters)
    facts = _model_facts(model, tokenizer, checkpoint, labels, settings, embedding)
    facts = replace(facts, labels_named=config.index_to_name is not None)
    of_task = task.facts(facts)
    return Original(
        model=model,
        tokenizer=tokenizer,
        inputs=inputs,
        max_length=most,
        labels=labels,
        parameters=task.archive_defaults(facts, config.parameters),
        facts=of_task,
        padding_side=task.padding_side or "right",
        truncation_side=task.truncation_side or tokenizer.truncation_side,
        loop=task.loop,
        converted=conversion.convert(tokenizer) if conversion.converts(tokenizer) else None,
        known_tokens=tokenizers.known_tokens(config, model, tokenizer),
        known_types=tokenizers.known_types(model, tokenizer, inputs),
        case_note=case_note,
        weights_note=weights_note,
        chat_note=chat.check_template(config, checkpoint, tokenizer, of_task),
        arrays=embedding.arrays,
        shortest=shortest,
        per_token=tuple(output.name for output in task.outputs if output.per_token),
    )


def _model_facts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: Checkpoint,
    labels: Tuple[str, ...],
    generation: Dict[str, object],
    embedding: Embedding,
) -> ModelFacts:
    """Return the model facts for the task."""
    # Not by attribute: version 4.26 logs an error for each unset one.
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}
    return ModelFacts(
        config=model.config.to_dict(),
        generation=generation,
        tokens={name[: -len("_token")]: (token, id_of_token(tokenizer, token)) for name, token in special.items()},
        labels=labels,
        chat_template=chat.served_template(tokenizer),
        read_json=checkpoint.read_object,
        padding_side=tokenizer.padding_side,
        languages=languages.known(tokenizer),
        source_id=languages.source_id(tokenizer),
        embedding=_embedding_facts(embedding, model),
    )


def _embedding_facts(embedding: Embedding, model: PreTrainedModel) -> Dict[str, object]:
    """Return sentence-transformers' facts for the task; its layers' weights have their own file."""
    facts = dataclasses.asdict(replace(embedding, arrays={}))
    arrays = ARRAYS_FILE if embedding.arrays else None
    return {**facts, "layers": list(facts["layers"]), "arrays": arrays, "size": _vector_size(embedding, model)}


def _vector_size(embedding: Embedding, model: PreTrainedModel) -> Optional[int]:
    """Return how many numbers a pooled vector has; None if the model's configuration does not say it."""
    dense = [layer["name"] for layer in embedding.layers if layer["kind"] == "dense"]
    if dense:
        return len(embedding.arrays[f"{dense[-1]}.weight"])
    hidden = getattr(model.config, "hidden_size", None)
    return hidden * len(embedding.pooling.split("+")) if isinstance(hidden, int) else None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings: important ones are raised as errors."""
    mine = _PARALLEL not in os.environ
    os.environ.setdefault(_PARALLEL, "true")
    try:
        with pretrained.quiet():
            yield
    finally:
        if mine:
            os.environ.pop(_PARALLEL, None)
