"""The number of tokens that a model reads: the configured length, or the checkpoint's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Optional, Type

from traceserve_runtime.tasks import TASKS

from traceserve.building.checkpoints import sentence_transformers
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from traceserve_runtime.tasks.contract import Task
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The configuration keys for the number of positions. A T5 has `n_positions` too, without meaning.
_POSITIONS = ("max_position_embeddings", "max_encoder_position_embeddings")


def max_length(
    config: SetupConfig, checkpoint: Checkpoint, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Return the longest row: the configured length, which the model must be able to read, or a default.

    The default is the smallest of the tokenizer's, the model's and the task's number. A configured length may exceed
    the tokenizer's: `model_max_length` is its authors' training length, and a model with relative positions reads on.
    """
    positions = _positions(model)
    lengths = config.sequence_lengths
    wanted = lengths[-1] if isinstance(lengths, list) else config.max_length
    if wanted is None:
        task = TASKS[config.task]
        own = _sentence_length(task, checkpoint)
        most = _whole_attention(model), _same_rotations(model, task)
        limits = (tokenizer.model_max_length, positions, *most, own or task.longest_default)
        return int(min(limit for limit in limits if limit is not None))
    if positions is not None and wanted > positions:
        raise ConfigError(
            f"max_length is {wanted}, but {config.model_name} reads at most {positions} tokens: it has no more positions"
        )
    _check_attention(config.model_name, model, wanted)
    _check_rotations(config, model, wanted)
    if positions is None or wanted > tokenizer.model_max_length:
        _check_reads(config.model_name, model, wanted, tokenizer.model_max_length)
    return int(wanted)


def attend_to_all(model: PreTrainedModel) -> None:
    """Let a BigBird's tokens attend to all others, as transformers does for good at the first row that is not longer than
    `_whole_attention`: its answers would depend on what it was asked before."""
    if _whole_attention(model) is not None:
        for module in model.modules():  # the outer ones first, which change those in them
            set_type: Optional[Callable[[str], None]] = getattr(module, "set_attention_type", None)
            if set_type is not None:
                set_type("original_full")


def _whole_attention(model: PreTrainedModel) -> Optional[int]:
    """Return the longest row whose tokens attend to all others in a model that reads longer ones with block-sparse attention;
    None for all other models. (The number is in BigBird's and BigBird-Pegasus' code alone.)"""
    config = model.config
    if not any(getattr(module, "attention_type", None) == "block_sparse" for module in model.modules()):
        return None
    return int((5 + 2 * config.num_random_blocks) * config.block_size)


def _check_attention(name: str, model: PreTrainedModel, wanted: int) -> None:
    limit = _whole_attention(model)
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"max_length is {wanted}, but {name} reads rows of more than {limit} tokens with block-sparse attention, and shorter "
            f"ones with attention to all tokens, which no graph can hold both; set max_length to {limit}, or, for attention to "
            f'all tokens at any length, "attention_type": "original_full" in a copy of its config.json'
        )


def _same_rotations(model: PreTrainedModel, task: Type[Task]) -> Optional[int]:
    """Return the longest text that a model with LongRoPE writes by one set of factors; None for all other models.

    Beyond it others rotate all positions, so those before it have other keys than a cache holds (Phi-3, Phi-4-mini).
    """
    settings = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None)
    if not task.loop or not isinstance(settings, dict) or settings.get("rope_type", settings.get("type")) != "longrope":
        return None
    limit = settings.get("original_max_position_embeddings")
    limit = limit or getattr(model.config, "original_max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _check_rotations(config: SetupConfig, model: PreTrainedModel, wanted: int) -> None:
    limit = _same_rotations(model, TASKS[config.task])
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"max_length is {wanted}, but {config.model_name} rotates all positions of a text otherwise from {limit + 1} tokens "
            f"on (longrope), while keys of earlier ones are kept as they are; set max_length to {limit}"
        )


def _sentence_length(task: Type[Task], checkpoint: Checkpoint) -> Optional[int]:
    """Return the length to which sentence-transformers cuts its texts, None if it sets none; raises SourceError."""
    file, facts = sentence_transformers.settings_for(task, checkpoint)
    length = facts.get("max_seq_length")
    if length is None or (type(length) is int and length > 0):
        return length
    raise SourceError(f"{file}: max_seq_length should be a whole number above 0 or null, not {length!r}")


def _positions(model: PreTrainedModel) -> Optional[int]:
    """Return the model's number of positions, or None if they are only relative."""
    known = (getattr(model.config, key, None) for key in _POSITIONS)
    positions = next((value for value in known if isinstance(value, int) and value > 0), None)
    if (
        positions is None or getattr(model.config, "position_biased_input", True) is False
    ):  # DeBERTa's, if only relative
        return None
    return positions - _first_position(model)


def _first_position(model: PreTrainedModel) -> int:
    """Return the position of a row's first token: RoBERTa and its kin count from their padding's id + 1."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    indices = (getattr(table, "padding_idx", None) for table in tables)
    return next((int(index) + 1 for index in indices if index is not None), 0)


def _check_reads(name: str, model: PreTrainedModel, length: int, advised: int) -> None:
    """Raise ConfigError if the model cannot read this many tokens, which no file of the checkpoint guarantees.

    The number of positions may be stored elsewhere, so the model is run.
    """
    import torch

    # Of an encoder and a decoder, the encoder reads.
    reader = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    ids = torch.ones((1, length), dtype=torch.int64)
    try:
        with torch.no_grad():
            reader(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"max_length is {length}, but {name} cannot read so many tokens ({type(error).__name__})"
            + (f"; its tokenizer's model_max_length is {advised:,}" if advised < length else "")
        ) from error
