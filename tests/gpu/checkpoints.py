"""Checkpoints of real sizes with random weights, and tokenizers with one token per word, for exact lengths."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors


class Size(NamedTuple):
    """A model: its configuration, its auto-model, its task, and the longest row."""

    config: str
    options: Dict[str, Any]
    auto_model: str
    task: str
    max_length: int


SIZES = {
    "bert-base": Size(
        "BertConfig", {"num_labels": 4}, "AutoModelForSequenceClassification", "sequence_classification", 256
    ),
    "llama-135m": Size(
        "LlamaConfig",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        "AutoModelForCausalLM",
        "text_generation",
        256,
    ),
}
# For a rehearsal on a CPU: the same code, in seconds.
SMALLER: Dict[str, Dict[str, Any]] = {
    "bert-base": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 2000,
    },
    "llama-135m": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 2000,
    },
}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make(folder: Path, name: str, small: bool) -> Path:
    """Write the checkpoint `name`, with seeded random weights."""
    size = SIZES[name]
    options = {**size.options, **(SMALLER[name] if small else {})}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = getattr(transformers, size.config)(**{**options, **ids})
    torch.manual_seed(0)
    model = getattr(transformers, size.auto_model).from_config(config)
    model.save_pretrained(folder)
    _tokenizer(config.vocab_size, size.max_length).save_pretrained(folder)
    return folder


def texts(lengths: Sequence[int], words: int, seed: int = 0) -> List[str]:
    """Return texts with this many tokens each, without special ones, from a vocabulary with `words` tokens."""
    chosen = random.Random(seed)
    return [" ".join(f"w{chosen.randrange(len(_SPECIAL), words)}" for _ in range(length)) for length in lengths]


def vocabulary(name: str, small: bool) -> int:
    """Return the size of this checkpoint's vocabulary."""
    own = {**SIZES[name].options, **(SMALLER[name] if small else {})}
    return int(own.get("vocab_size", 30522))


def _tokenizer(count: int, max_length: int) -> Any:
    pieces = [*_SPECIAL, *(f"w{i}" for i in range(len(_SPECIAL), count))]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_length,
    )
