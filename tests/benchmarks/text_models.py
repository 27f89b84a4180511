"""Decoders to measure with: a random Llama as large as a small real one, and a Llama's checkpoint as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import gguf
import models
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

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
GGUF_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def random_llama(folder: Path) -> Path:
    """Make a checkpoint of 135 million weights, as wide and deep as SmolLM2, with transformers' initial values.

    They are as large as trained ones. Every token has a text of its own, so that servers can show each at once.
    """
    tokenizer = _tokenizer("gpt", SMOLLM2["vocab_size"])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return _saved(folder, transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMOLLM2, **ids), tokenizer)


def random_marian(folder: Path) -> Path:
    """Make an encoder-decoder with random weights, as wide and deep as the opus-mt models."""
    tokenizer = _tokenizer("t5", 32001)
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


def _tokenizer(kind: str, size: int) -> Any:
    tokenizer = models.make_tokenizer(kind)
    # In the vocabulary without a merge that leads to them: written, but never read.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    words.update({f"Ġw{i}": i for i in range(len(words), size)})
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(content))
    return tokenizer


def _saved(folder: Path, kind: Any, config: Any, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.model_max_length = 2048
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(source: Path, path: Path, dtype: str) -> Path:
    """Write a Llama's checkpoint as a GGUF file, its matrices in `dtype` and vectors in float32."""
    config = transformers.AutoConfig.from_pretrained(source)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, source)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in load_file(source / "model.safetensors").items():
        own = _gguf_name(name)
        values = tensor.float().numpy()
        count = heads.get(own.split(".")[-2])
        if count:  # GGUF rotates neighbours, transformers halves
            halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        kind = GGUF_TYPES[dtype if values.ndim == 2 else "float32"]
        stored = np.ascontiguousarray(values) if dtype == "float32" else gguf.quants.quantize(values, kind)
        writer.add_tensor(own, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    stem, weight = name.rsplit(".", 1)
    if stem in _OTHERS:
        return f"{_OTHERS[stem]}.{weight}"
    _, _, number, layer = stem.split(".", 3)
    return f"blk.{number}.{_LAYER[layer]}.{weight}"


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    """Add a byte-level BPE tokenizer, or one of SentencePiece's kind, whose merges' ranks become scores."""
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    by_id: Dict[int, str] = {number: token for token, number in content["model"]["vocab"].items()}
    special = {each["id"]: each["content"] for each in content["added_tokens"]}
    by_id.update(special)
    tokens = [by_id[i] for i in range(len(by_id))]
    merges: List[str] = [each if isinstance(each, str) else " ".join(each) for each in content["model"]["merges"]]
    pieces = bool(content["model"].get("byte_fallback"))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_token_list(tokens)
    kinds = [_kind(token, i in special) for i, token in enumerate(tokens)]
    writer.add_token_types(kinds)
    if pieces:
        ranks = {merge.replace(" ", ""): rank for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(ranks.get(token, len(merges) + i)) for i, token in enumerate(tokens)])
    else:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)


def _kind(token: str, special: bool) -> gguf.TokenType:
    if special:
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if token.startswith("<0x") else gguf.TokenType.NORMAL
