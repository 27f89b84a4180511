"""Decoders to measure with: a random Llama as large as a small real one, and a Llama's checkpoint as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Optional

import gguf
import gguf_files
import models
import pytest
import torch
import transformers
from conftest import run_export
from traceserve.building.gate.texts import SENTENCES

SMOLLM2: Dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# As wide and deep as Qwen3.5-0.8B and LFM2-350M, with fewer words.
RECURRENT: Dict[str, Dict[str, Any]] = {
    "qwen3.5": {
        "vocab_size": 49152,
        "hidden_size": 1024,
        "num_hidden_layers": 24,  # every fourth one attends
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "intermediate_size": 3584,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "lfm2": {
        "vocab_size": 49152,
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 4608,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "max_position_embeddings": 2048,
    },
}
GGUF_TYPES: Dict[str, Any] = {
    "float32": None,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
}


def random_llama(folder: Path, layers: int = SMOLLM2["num_hidden_layers"]) -> Path:
    """Make a checkpoint of 135 million weights, as wide and deep as SmolLM2, with transformers' initial values; or one of
    fewer layers.

    They are as large as trained ones, and saved in bfloat16, as SmolLM2's are. Every token has a text of its own, so that
    servers can show each at once.
    """
    tokenizer = _tokenizer("gpt", SMOLLM2["vocab_size"])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return _saved(
        folder,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**{**SMOLLM2, "num_hidden_layers": layers}, **ids),
        tokenizer,
        torch.bfloat16,
    )


def random_recurrent(folder: Path, family: str) -> Path:
    """Make a checkpoint of a family whose layers have states of a fixed size, with transformers' initial values."""
    sizes = RECURRENT[family]
    tokenizer = _tokenizer("gpt", sizes["vocab_size"])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, models.RECURRENT[family].config)(**sizes, **ids, pad_token_id=tokenizer.pad_token_id)
    model = type(transformers.AutoModelForCausalLM.from_config(config))
    return _saved(folder, model, config, tokenizer, torch.bfloat16)


def random_marian(folder: Path) -> Path:
    """Make an encoder-decoder with random weights, as wide and deep as the opus-mt models, padding last as in theirs."""
    tokenizer = _tokenizer("t5", 32001, last="<pad>")
    config = transformers.MarianConfig(
        vocab_size=32001,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return _saved(folder, transformers.MarianMTModel, config, tokenizer)


def random_t5(folder: Path) -> Path:
    """Make an encoder-decoder with random weights, as wide and deep as t5-small."""
    tokenizer = _tokenizer("t5", 32128)
    begins: Any = {"decoder_start_token_id": tokenizer.pad_token_id}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.T5Config(vocab_size=32128, **ids, **begins)
    return _saved(folder, transformers.T5ForConditionalGeneration, config, tokenizer)


FAMILIES = {"llama": random_llama, "marian": random_marian, "t5": random_t5}


def _tokenizer(kind: str, size: int, last: Optional[str] = None) -> Any:
    tokenizer = models.make_tokenizer(kind)
    # In the vocabulary without a merge that leads to them: written, but never read.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    words.update({f"Ġw{i}": i for i in range(len(words), size)})
    if last:
        words[f"Ġw{size - 1}"], words[last] = words[last], size - 1
        for added in content["added_tokens"]:
            added["id"] = words[added["content"]]
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(content))
    return tokenizer


def _saved(folder: Path, kind: Any, config: Any, tokenizer: Any, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    kind(config).to(dtype).save_pretrained(folder)
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    return folder


def built(folder: Path, content: Dict[str, Any], **options: Any) -> Path:
    """Export a configuration's content through a shortened gate: random weights have no clear answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("traceserve.building.gate.verification.TEXTS", SENTENCES[1:3])
        patch.setattr("traceserve.building.gate.outputs.BATCHES", (2,))
        patch.setattr("traceserve.building.writers.lowering.int8.KEPT_SHARES", (0.0,))
        lowered = content.get("dtype", "float32") != "float32"
        run_export(folder, content, **{"allow_drift": lowered, **options})
    return folder


def write_gguf(source: Path, path: Path, dtype: str) -> Path:
    """Write a Llama's checkpoint as a GGUF file, its matrices in `dtype` and vectors in float32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return gguf_files.write_gguf(path, source, GGUF_TYPES[dtype], begins=begins)
