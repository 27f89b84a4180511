"""Case: which settings lower a text's case or keep it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, Optional, Type

from traceserve.building.checkpoints import sentence_transformers
from traceserve.building.checkpoints.checkpoint import Checkpoint
from traceserve.building.config.setup_config import SetupConfig
from traceserve.errors import ConfigError

if TYPE_CHECKING:
    from traceserve_runtime.tasks.contract import Task
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILE, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def case_options(config: SetupConfig, checkpoint: Checkpoint) -> Dict[str, object]:
    """Return the tokenizer's options if its files do not set lower-casing, as with only a vocab.txt."""
    return {} if config.do_lower_case is None or _is_said(checkpoint) else {"do_lower_case": config.do_lower_case}


def _is_said(checkpoint: Checkpoint) -> bool:
    """Return whether the tokenizer's own files set it."""
    facts = checkpoint.read_object(_TOKENIZER_CONFIG) or {}
    return bool(checkpoint.gguf_file) or (checkpoint.folder / _TOKENIZER_FILE).is_file() or "do_lower_case" in facts


def check_case(config: SetupConfig, tokenizer: PreTrainedTokenizerBase) -> Optional[str]:
    """Return a note on do_lower_case; raises ConfigError if the tokenizer does the opposite."""
    wanted = config.do_lower_case
    if wanted is None or wanted is lowers(tokenizer):
        return None
    does = "keeps capitals" if wanted else "lowers them"
    if wanted and not _can_lower(tokenizer):
        return f"do_lower_case changes nothing: {type(tokenizer).__name__} {does}, as it did in training"
    raise ConfigError(
        f"do_lower_case is {str(wanted).lower()}, but the tokenizer of {config.model_name} {does} by its own files; remove "
        "do_lower_case, or fix the checkpoint's tokenizer if it is not the training's"
    )


def lowers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether this tokenizer ignores case."""
    return bool(tokenizer("A Word")["input_ids"] == tokenizer("a word")["input_ids"])


def _can_lower(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether this kind of tokenizer has the setting: WordPiece has, byte-level ones never had."""
    return getattr(tokenizer, "is_fast", False) and '"BertNormalizer"' in tokenizer.backend_tokenizer.to_str()


def follow_sentence_transformers(task: Type[Task], checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lower the case before the tokenizer's own normalizer if sentence-transformers' settings say so."""
    facts = sentence_transformers.settings_for(task, checkpoint).facts
    if facts.get("do_lower_case") and getattr(tokenizer, "is_fast", False) and not lowers(tokenizer):
        from tokenizers import normalizers

        backend = tokenizer.backend_tokenizer
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
