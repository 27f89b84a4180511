"""Llamas as GGUF files, in the layout of llama.cpp's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import gguf
import torch
import transformers

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(path: Path, source: Path, quantization: Any = None, scaled: str = "", begins: bool = False) -> Path:
    """Write a Llama's folder as a GGUF file, its matrices in `quantization` or float32.

    `scaled` adds scaled positions; `begins`: a text begins with the token for it.
    """
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    turning = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}  # transformers 5, and 4
    writer.add_rope_freq_base(turning["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, source, begins)
    if scaled == "metadata":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    if scaled == "tensor":
        writer.add_tensor("rope_freqs.weight", torch.ones(4).numpy())
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for count in (count for part, count in heads.items() if part in name):  # GGUF rotates neighbours, not halves
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        data = weight.float().contiguous().numpy()
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        if quantization is None or data.ndim == 1:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quantize(data, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path, begins: bool) -> None:
    """Add a byte-level BPE tokenizer, or one of SentencePiece's kind, whose merges' ranks become scores."""
    document = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    vocabulary: Dict[str, int] = document["model"]["vocab"]
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {token["content"] for token in document["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    writer.add_token_list(tokens)
    writer.add_token_types([_kind(token, token in special) for token in tokens])
    if document["model"].get("byte_fallback"):
        ranks = {merge.replace(" ", ""): rank for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(ranks.get(token, len(merges) + i)) for i, token in enumerate(tokens)])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(begins)


def _kind(token: str, special: bool) -> gguf.TokenType:
    if special:
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if token.startswith("<0x") else gguf.TokenType.NORMAL
