"""A checkpoint's tokenizer: loaded like in transformers, and checked against its model."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Optional, Sequence

from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints import case, conversion, files, gguf, head_weights
from traceserve.building.checkpoints.checkpoint import VOCABULARIES, Checkpoint
from traceserve.building.checkpoints.lookups import embedding_weights
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ExportError, SourceError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SENTENCEPIECE = ("*.model", "*.spm")
_SURELY_UNKNOWN = "\U000130c0"  # an Egyptian hieroglyph
_READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> module


def load_tokenizer(config: SetupConfig, checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer; raises SourceError, ExportError if a worker could not run it."""
    from transformers import AutoTokenizer

    _check_readers(config, checkpoint)
    try:
        with gguf.located(checkpoint) as (folder, in_file):
            tokenizer = AutoTokenizer.from_pretrained(
                folder,
                use_fast=True,
                local_files_only=True,
                trust_remote_code=config.trust_remote_code,
                **({"gguf_file": str(in_file), **gguf.tokenizer_options(checkpoint)} if in_file else {}),
                **case.case_options(config, checkpoint),
            )
    except Exception as error:  # transformers' many tokenizers raise anything
        if not checkpoint.gguf_file:
            _check_present(config, checkpoint)
            fault = head_weights.configuration_fault(config, checkpoint.folder)
            if fault:  # it names the tokenizer's class
                raise SourceError(f"{config.model_name}: its config.json cannot be loaded: {fault}") from error
        raise SourceError(f"the tokenizer of {config.model_name} cannot be loaded: {first_line(error)}") from error
    single = len(TASKS[config.task].fields) == 1  # converted tokenizers read no pairs
    if not getattr(tokenizer, "is_fast", False) and not (single and conversion.converts(tokenizer)):
        raise ExportError(
            f"{config.model_name} has no fast tokenizer ({type(tokenizer).__name__} runs in Python only), and the worker "
            "has the tokenizers package only; convert it to a tokenizer.json first"
        )
    _check_reads_all(config, tokenizer)
    gguf.check_tokenizer(checkpoint, tokenizer)
    if not in_file:  # transformers 5 makes an empty tokenizer instead
        _check_present(config, checkpoint)
    tokenizer.model_max_length = _longest(tokenizer.model_max_length)
    return tokenizer


def _check_reads_all(config: SetupConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ExportError for a tokenizer that fails at a text with something that is not in its vocabulary."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:  # it is converted later
        return
    try:
        fast.encode(_SURELY_UNKNOWN)
    except Exception as error:  # the tokenizers package raises no other kind
        raise ExportError(
            f"the tokenizer of {config.model_name} has no unknown token, and fails at texts with words that are not in its "
            f"vocabulary ({first_line(error)}); give it an unk_token"
        ) from error


def _check_present(config: SetupConfig, checkpoint: Checkpoint) -> None:
    """Raise SourceError for a checkpoint without a tokenizer's vocabulary."""
    if not files.has_vocabulary(checkpoint.folder):
        raise SourceError(f"{config.model_name}: {checkpoint.folder} has no tokenizer ({', '.join(VOCABULARIES)})")


def _longest(length: object) -> float:
    """Return tokenizer_config.json's model_max_length as a number; infinite if it is none above 0, as -1."""
    if isinstance(length, str) and length.isdecimal():
        length = int(length)
    return length if isinstance(length, (int, float)) and length is not True and length > 0 else math.inf


def _check_readers(config: SetupConfig, checkpoint: Checkpoint) -> None:
    """Raise ExportError without the packages that read sentencepiece's files: transformers' own error names others,
    such as tiktoken."""
    if checkpoint.gguf_file or (checkpoint.folder / "tokenizer.json").is_file():
        return
    found = (path for pattern in _SENTENCEPIECE for path in sorted(checkpoint.folder.glob(pattern)))
    file = next((path for path in found if _is_protobuf(path)), None)
    missing = [package for package, module in _READERS.items() if not _installed(module)]
    if file is not None and missing:
        raise ExportError(
            f"the tokenizer of {config.model_name} is a file of sentencepiece ({file.name}), and to read it "
            f"{' and '.join(missing)} must be installed: pip install {' '.join(_READERS)}"
        )


def _is_protobuf(path: Path) -> bool:
    """Return whether the file begins like sentencepiece's. (A tokenizer.model may be tiktoken's, which is text.)"""
    with path.open("rb") as stream:
        return stream.read(1) == b"\n"


def _installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def known_tokens(config: SetupConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Optional[int]:
    """Return how many of the tokenizer's tokens have embeddings in the model; None if all do.

    Requests with tokens that were added after training, without resizing the embeddings, are refused; all other
    texts are answered. Raises ExportError if hardly any text could be.
    """
    count = _embeddings(model)
    highest = max(tokenizer.get_vocab().values())
    if count is None or highest < count:
        return None
    added = set(tokenizer.get_added_vocab().values())
    strange = sum(token_id >= count and token_id not in added for token_id in tokenizer.get_vocab().values())
    if strange:
        raise ExportError(
            f"the tokenizer of {config.model_name} is not this model's: {strange:,} of its pieces have numbers of {count:,} "
            f"or more, and the model has {count:,} embeddings; take the tokenizer that the model was trained with"
        )
    everywhere = [tokenizer.convert_ids_to_tokens(i) for i in tokenizer("")["input_ids"] if i >= count]
    mask = getattr(tokenizer, "mask_token_id", None)
    if everywhere or (mask or 0) >= count:
        token = everywhere[0] if everywhere else tokenizer.mask_token
        raise ExportError(
            f"{config.model_name}: the tokenizer's {token} was added to it, but the model has only {count:,} embeddings and "
            "none for it; call model.resize_token_embeddings(len(tokenizer)) and train, or take the model's own tokenizer"
        )
    return count


def known_types(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Sequence[str]) -> Optional[int]:
    """Return how many token types the model has, if they are one of its inputs and the tokenizer gives a pair of texts more;
    else None.

    transformers fails on such pairs (YOSO with BERT's tokenizer, for example): they are refused.
    """
    count = getattr(model.config, "type_vocab_size", None)
    if "token_type_ids" not in inputs or not isinstance(count, int):
        return None
    return count if 0 < count <= max(tokenizer("a", "b")["token_type_ids"]) else None


def _embeddings(model: PreTrainedModel) -> Optional[int]:
    """Return how many tokens the model can look up, None if unknown."""
    try:
        return len(embedding_weights(model))
    except (AttributeError, NotImplementedError):  # hash embeddings; a curated model
        size = getattr(model.config, "vocab_size", None)
        return size if isinstance(size, int) else None
