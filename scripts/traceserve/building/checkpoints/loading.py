"""A checkpoint to the original: its model and tokenizer, in float32, ready to be traced and compared with."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

from traceserve_runtime.manifest import TokenizerFacts
from traceserve_runtime.runtimes import calling, pretrained
from traceserve_runtime.tasks import TASKS
from traceserve_runtime.tasks.contract import ModelFacts

from traceserve.building.checkpoints import (
    case,
    conversion,
    generation,
    gguf,
    languages,
    sentence_transformers,
    short_rows,
    tokenizers,
)
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.checkpoints.conversion import PIECES_FILE, Converted
from traceserve.building.checkpoints.labels import labels as checkpoint_labels
from traceserve.building.checkpoints.lengths import max_length
from traceserve.building.checkpoints.libraries import LOADERS
from traceserve.building.checkpoints.sentence_transformers import Embedding
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ExportError

TOKENIZER_FILE = "tokenizer.json"
ARRAYS_FILE = "layers.npz"
# The inputs that the runtime makes, in the order in which they are passed.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Original:
    """What the archive is made from and measured against."""

    model: Any  # transformers.PreTrainedModel, or called as one; float32, eval
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    inputs: Tuple[str, ...]
    max_length: int
    labels: Tuple[str, ...]
    parameters: Dict[str, Any]
    facts: Dict[str, Any]
    padding_side: str
    truncation_side: str
    dtype: str = "float32"  # what the model is traced in; another one has another model, see `precision`
    converted: Optional[Converted] = None  # the tokenizer, where transformers runs it in Python only
    known_tokens: Optional[int] = None  # the tokenizer's, where the model lacks some of them
    case_note: Optional[str] = None  # of do_lower_case
    arrays: Dict[str, Any] = field(default_factory=dict)  # what the task itself computes with, float32
    kept: Tuple[str, ...] = ()  # the layers that are left in float32 all the same
    shortest: int = 1  # the least tokens of a row that the model can read; shorter ones are padded to it
    per_token: Tuple[str, ...] = ()  # the outputs that have a value for each token

    @property
    def tokenizer_facts(self) -> TokenizerFacts:
        """What the worker needs beside tokenizer.json."""
        tokenizer = self.tokenizer
        # What the model takes for padding goes before the tokenizer's own: classifiers of decoders look for it by its id.
        numbers = [number for number in (calling.pad_id(self.model), tokenizer.pad_token_id) if number is not None]
        if self.known_tokens is not None:  # padding may have been added to the tokenizer alone
            numbers = [number for number in numbers if number < self.known_tokens]
        return TokenizerFacts(
            file=TOKENIZER_FILE,
            pad_id=next(iter(numbers), 0),
            pad_type_id=tokenizer.pad_token_type_id,
            padding_side=self.padding_side,
            truncation_side=self.truncation_side,
            clean_up=_cleans_up(tokenizer),
            pieces=None if self.converted is None else PIECES_FILE,
            embeddings=self.known_tokens,
        )

    @property
    def note(self) -> Optional[str]:
        """What the user should know of it."""
        notes = [self._short_note, self.case_note if self.known_tokens is None else self._tokens_note]
        return "\n".join(note for note in notes if note) or None

    @property
    def _short_note(self) -> Optional[str]:
        if self.shortest == 1:
            return None
        return (
            f"transformers' own {type(self.model).__name__} fails on rows below {self.shortest} tokens (special ones "
            "included): they are padded to that length"
        )

    @property
    def _tokens_note(self) -> Optional[str]:
        if self.known_tokens is None:
            return None
        more = len(self.tokenizer) - self.known_tokens
        return (
            f"the tokenizer has {more:,} added token{'s' * (more > 1)} that the model has no embedding for: a text with one "
            "is refused (400)"
        )

    def write_arrays(self, folder: Path) -> Tuple[str, ...]:
        """Write the arrays that the task itself computes with; the names of the files."""
        if not self.arrays:
            return ()
        import numpy as np

        np.savez(folder / ARRAYS_FILE, **self.arrays)
        return (ARRAYS_FILE,)

    def write_tokenizer(self, folder: Path) -> None:
        """Write tokenizer.json as transformers uses it, without padding and truncation."""
        converted = self.converted
        if converted is not None:
            converted.write(folder)
        backend = self.tokenizer.backend_tokenizer if converted is None else converted.tokenizer
        document = json.loads(backend.to_str())
        document.update(truncation=None, padding=None)
        text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
        (folder / TOKENIZER_FILE).write_text(text, encoding="utf-8")


def load(config: SetupConfig, checkpoint: Checkpoint, config_folder: Path) -> Original:
    """The original model and tokenizer of a checkpoint, checked against `config`; raises what says how they disagree.

    The tokenizer is transformers', whatever library has the model: of it the worker needs tokenizer.json and the special
    tokens, and the gate asks it. (The curated library's own are slow ones, or without the special tokens' names.)
    """
    gguf.check(checkpoint)
    tokenizer = tokenizers.load(config, checkpoint)
    languages.configure(config, tokenizer)
    model = LOADERS[config.library](config, checkpoint)
    accepted = inspect.signature(model.forward).parameters
    inputs = tuple(name for name in INPUTS if name in accepted and name in tokenizer.model_input_names)
    if "attention_mask" in accepted and "attention_mask" not in inputs:
        inputs = tuple(name for name in INPUTS if name in (*inputs, "attention_mask"))
    if "input_ids" not in inputs:
        raise ExportError(f"{config.model_name} does not read text: its model takes {', '.join(accepted)}")
    task = TASKS[config.task]
    if task.loop:
        inputs = INPUTS[:2]
    case_note = case.check(config, tokenizer)
    case.follow_sentence_transformers(checkpoint, tokenizer)
    labels = checkpoint_labels(config, model, config_folder) if task.labelled else ()
    most = max_length(config, checkpoint, model, tokenizer)
    shortest = 1 if task.loop else short_rows.shortest(model, tokenizer, inputs, most)
    embedding = sentence_transformers.read(checkpoint) if task.reads_vectors else Embedding()
    facts = _model_facts(model, tokenizer, checkpoint, labels, generation.settle(model, task), embedding)
    return Original(
        model=model,
        tokenizer=tokenizer,
        inputs=inputs,
        max_length=most,
        labels=labels,
        parameters={**task.defaults(facts), **config.parameters},
        facts=task.facts(facts),
        padding_side=task.padding_side or "right",
        truncation_side=task.truncation_side or tokenizer.truncation_side,
        converted=conversion.convert(tokenizer) if conversion.converts(tokenizer) else None,
        known_tokens=tokenizers.known_tokens(config, model, tokenizer),
        case_note=case_note,
        arrays=embedding.arrays,
        shortest=shortest,
        per_token=tuple(output.name for output in task.outputs if output.per_token),
    )


def _model_facts(
    model: Any,
    tokenizer: Any,
    checkpoint: Checkpoint,
    labels: Tuple[str, ...],
    generation: Dict[str, Any],
    embedding: Embedding,
) -> ModelFacts:
    """What the task may learn of the model."""
    # Not by the attributes: version 4.26 complains of each that is not set.
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token")}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by their use
        template = template.get("default")
    return ModelFacts(
        config=model.config.to_dict(),
        generation=generation,
        tokens={
            name[: -len("_token")]: (token, tokenizer.convert_tokens_to_ids(token)) for name, token in special.items()
        },
        labels=labels,
        chat_template=template if isinstance(template, str) else None,
        read_json=checkpoint.read_json,
        padding_side=tokenizer.padding_side,
        languages=languages.known(tokenizer),
        source_id=languages.source_id(tokenizer),
        embedding=_embedding_facts(embedding),
    )


def _embedding_facts(embedding: Embedding) -> Dict[str, Any]:
    """Of sentence-transformers, as the task has it; the weights of its layers travel in a file of their own."""
    facts = dataclasses.asdict(replace(embedding, arrays={}))
    return {**facts, "layers": list(facts["layers"]), "arrays": ARRAYS_FILE if embedding.arrays else None}


def _cleans_up(tokenizer: Any) -> bool:
    """Whether the tokenizer's `decode` takes the space before punctuation away; its own setting holds for some only."""
    ids = tokenizer("a . b", add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings: what matters of them is raised as an error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with pretrained.quiet():
        yield
