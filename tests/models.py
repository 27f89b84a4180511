"""Tiny random models, one per architecture, with a small tokenizer; in Hugging Face's folder layout.

Weights depend only on their names and shapes, so checkpoints are the same under every version of transformers.
"""

from __future__ import annotations

import zlib
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, NamedTuple, Tuple

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from traceserve.building.gate.texts import SENTENCES, VERY_LONG
from transformers.models.auto import modeling_auto

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
}


SIZE_OF_BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 160,
}


class Architecture(NamedTuple):
    """A family: its configuration class, tokenizer kind, and configuration values."""

    config: str
    tokenizer: str  # for make_tokenizer
    options: Dict[str, Any]
    encodes: bool = True  # whether it runs once, for tasks without a loop; else it only writes


ARCHITECTURES = {
    "bert": Architecture("BertConfig", "bert", SIZE),
    "distilbert": Architecture(
        "DistilBertConfig",
        "wordpiece",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 160},
    ),
    "roberta": Architecture("RobertaConfig", "roberta", {**SIZE, "type_vocab_size": 1}),
    "xlm-roberta": Architecture("XLMRobertaConfig", "roberta", {**SIZE, "type_vocab_size": 1}),
    "electra": Architecture("ElectraConfig", "bert", {**SIZE, "embedding_size": 16}),
    "deberta-v2": Architecture(
        "DebertaV2Config",
        "bert",
        {**SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0},
    ),
    "albert": Architecture("AlbertConfig", "bert", {**SIZE, "embedding_size": 16}),
    "mpnet": Architecture("MPNetConfig", "roberta", SIZE),
    "modernbert": Architecture(
        "ModernBertConfig", "wordpiece", {**SIZE, "global_attn_every_n_layers": 2, "local_attention": 16}
    ),
    "gpt2": Architecture("GPT2Config", "gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}),
    "llama": Architecture("LlamaConfig", "gpt", {**SIZE, "num_key_value_heads": 2}),
    "bart": Architecture("BartConfig", "roberta", {**SIZE_OF_BOTH, "decoder_start_token_id": 2}),
    "t5": Architecture(
        "T5Config",
        "t5",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        encodes=False,
    ),
    "marian": Architecture(
        "MarianConfig", "t5", {**SIZE_OF_BOTH, "decoder_start_token_id": 0, "forced_eos_token_id": 1}, encodes=False
    ),
}


# Families that other libraries have too, only for their tests.
FURTHER = {
    "camembert": Architecture("CamembertConfig", "roberta", {**SIZE, "type_vocab_size": 1}),
    "gpt-neox": Architecture("GPTNeoXConfig", "gpt", {**SIZE, "rotary_pct": 0.5}),
    "falcon": Architecture("FalconConfig", "gpt", {"max_position_embeddings": 160}),
    "phi3": Architecture("Phi3Config", "gpt", {**SIZE, "num_key_value_heads": 2}),
    "mbart": Architecture("MBartConfig", "roberta", SIZE_OF_BOTH),
    "mpt": Architecture("MptConfig", "gpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 160}),
}
# Families with their own way of writing; those with another kind of cache, or none, reread everything.
# Since transformers 5 their layers' states have a common cache: chunks of 16 positions, and of 64 (Qwen3.5).
RECURRENT = {
    "qwen3.5": Architecture(
        "Qwen3_5TextConfig",
        "gpt",
        {
            **SIZE,
            "num_hidden_layers": 4,  # the last one attends
            "num_key_value_heads": 2,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": Architecture(
        "Lfm2Config",
        "gpt",
        {
            **SIZE,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "falcon-h1": Architecture(  # each layer has keys, values and states
        "FalconH1Config",
        "gpt",
        {
            **SIZE,
            "num_key_value_heads": 2,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "mamba2": Architecture(  # no layer has keys and values
        "Mamba2Config",
        "gpt",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "state_size": 8,
            "chunk_size": 16,
        },
    ),
}

WRITING = {
    "bloom": Architecture("BloomConfig", "gpt", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "openai-gpt": Architecture("OpenAIGPTConfig", "gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}),
    "xlnet": Architecture("XLNetConfig", "xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "led": Architecture(
        "LEDConfig",
        "roberta",
        {
            **{name: size for name, size in SIZE_OF_BOTH.items() if name != "max_position_embeddings"},
            "attention_window": 8,
            "max_encoder_position_embeddings": 160,
            "max_decoder_position_embeddings": 160,
            "decoder_start_token_id": 2,
        },
    ),
    # By its own default no sequence of three source tokens is written.
    "blenderbot": Architecture("BlenderbotConfig", "t5", {**SIZE_OF_BOTH, "decoder_start_token_id": 1}),
    "blenderbot-small": Architecture("BlenderbotSmallConfig", "t5", {**SIZE_OF_BOTH, "decoder_start_token_id": 1}),
    "m2m_100": Architecture("M2M100Config", "t5", {**SIZE_OF_BOTH, "decoder_start_token_id": 1}),
    "switch": Architecture(
        "SwitchTransformersConfig",
        "t5",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_experts": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "decoder_start_token_id": 0,
        },
    ),
    # Two models of different sizes; only the decoder refers to the other one.
    **RECURRENT,
    "encoder-decoder": Architecture(
        "EncoderDecoderConfig",
        "bert",
        {
            "encoder": {"model_type": "bert", **SIZE},
            "decoder": {
                "model_type": "bert",
                **SIZE,
                "hidden_size": 48,
                "is_decoder": True,
                "add_cross_attention": True,
            },
            "decoder_start_token_id": 2,
        },
    ),
}
# Families whose forward pass fixes lengths when traced, changes with padding, has its own functions for training,
# or keeps no cache between steps.
UNEVEN = {
    "longformer": Architecture("LongformerConfig", "roberta", {**SIZE, "attention_window": 8}),
    # It reads more than 28 tokens with block-sparse attention.
    "big_bird": Architecture("BigBirdConfig", "roberta", {**SIZE, "block_size": 4, "num_random_blocks": 1}),
    "fnet": Architecture("FNetConfig", "bert", {**SIZE, "tpu_short_seq_length": 16}),
    "convbert": Architecture("ConvBertConfig", "bert", {**SIZE, "embedding_size": 32, "conv_kernel_size": 3}),
    "reformer": Architecture(
        "ReformerConfig",
        "bert",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "attention_head_size": 8,
            "feed_forward_size": 64,
            "max_position_embeddings": 160,
            "axial_pos_embds": False,
            "attn_layers": ["local", "local"],
            "local_attn_chunk_length": 64,
            "is_decoder": False,
        },
    ),
    "mamba": Architecture("MambaConfig", "gpt", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "nystromformer": Architecture(
        "NystromformerConfig", "bert", {**SIZE, "conv_kernel_size": 3, "segment_means_seq_len": 8, "num_landmarks": 8}
    ),
    "yoso": Architecture("YosoConfig", "bert", SIZE),
    # Of transformers 5; it loops over the experts that its tokens hit.
    "openai_privacy_filter": Architecture(
        "OpenAIPrivacyFilterConfig",
        "bert",
        {**SIZE, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "funnel": Architecture(
        "FunnelConfig",
        "bert",
        {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1, 1], "num_decoder_layers": 1},
    ),
}


def auto_models(architecture: str) -> FrozenSet[str]:
    """Return transformers' auto classes for this family, by their own tables."""
    config = getattr(transformers, ARCHITECTURES[architecture].config)
    tables = {name: getattr(kind, "_model_mapping", ()) for name, kind in vars(modeling_auto).items()}
    return frozenset(name for name, table in tables.items() if name.startswith("AutoModel") and config in table)


def make(
    folder: Path, architecture: str, auto_model: str = "AutoModelForSequenceClassification", **options: Any
) -> Path:
    """Write a tiny random checkpoint into `folder`; `options` go into its configuration."""
    family = {**ARCHITECTURES, **UNEVEN, **FURTHER, **WRITING}[architecture]
    tokenizer = make_tokenizer(family.tokenizer)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    config = getattr(transformers, family.config)(
        **{
            "vocab_size": len(tokenizer),
            **family.options,
            **{f"{name}_token_id": value for name, value in ids.items()},
            **options,
        },
    )
    model = getattr(transformers, auto_model).from_config(config)
    # Tied weights use their alphabetically first name: the order differs between versions.
    # (torch 1.13 has no named_parameters(remove_duplicate=False).)
    owned = [
        (f"{path}.{name}".lstrip("."), parameter)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module.named_parameters(recurse=False)
    ]
    names = {parameter: name for name, parameter in sorted(owned, key=lambda item: item[0])[::-1]}
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(weights(name, parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights(name: str, shape: torch.Size) -> torch.Tensor:
    """Return widely spread random numbers: with small ones all texts have nearly one answer."""
    normal = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) > 1:
        return normal * 0.2
    return normal * 0.1 + (1 if name.endswith("weight") else 0)  # a norm's, or a bias


def make_tokenizer(kind: str) -> Any:
    """Make a fast tokenizer trained on the samples.

    "bert" and "wordpiece", without types; byte-level BPE: "roberta", "gpt" without its own special tokens, and
    "t5", which ends texts; "xlnet", which ends them too, and pads on the left.
    """
    typed, kind = kind == "bert", "bert" if kind == "wordpiece" else kind
    special = {
        "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
        "roberta": {
            "bos": "<s>",
            "pad": "<pad>",
            "eos": "</s>",
            "unk": "<unk>",
            "mask": "<mask>",
            "cls": "<s>",
            "sep": "</s>",
        },
        "gpt": {"pad": "<pad>", "eos": "<end>", "bos": "<end>", "unk": "<end>"},
        "t5": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        "xlnet": {"pad": "<pad>", "eos": "</s>", "unk": "<unk>", "sep": "<sep>", "cls": "<cls>"},
    }[kind]
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if typed else [])
    trained = tokenizers.Tokenizer.from_str(_trained(kind, tuple(dict.fromkeys(special.values()))))
    if typed:  # to have tokenizers with and without a decoder
        trained.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained,
        model_max_length=160 if kind != "roberta" else 150,
        model_input_names=inputs,
        padding_side="left" if kind == "xlnet" else "right",
        **{f"{name}_token": token for name, token in special.items()},
    )


@lru_cache(maxsize=None)
def _trained(kind: str, special: Tuple[str, ...]) -> str:
    texts = [*SENTENCES, VERY_LONG]
    if kind == "bert":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.model = models.WordPiece(_pieces(tokenizer, texts, special), unk_token="[UNK]")
        tokenizer.add_special_tokens(list(special))
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in special}
    if kind == "bert":
        pairs = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pairs
        )
    elif kind == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(
            ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True
        )
    elif kind == "gpt":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    elif kind == "xlnet":
        pairs = [("<sep>", ids["<sep>"]), ("<cls>", ids["<cls>"])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <sep> <cls>", pair="$A <sep> $B <sep> <cls>", special_tokens=pairs
        )
    elif kind == "t5":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", ids["</s>"])]
        )
    return tokenizer.to_str()


def _pieces(tokenizer: Any, texts: List[str], special: Tuple[str, ...]) -> Dict[str, int]:
    """Return a WordPiece vocabulary: letters, and the most common beginnings and endings of words.

    The package's own trainer is not deterministic. Letters seen only once are left out, as unknown.
    """
    letters: Dict[str, int] = Counter()
    parts: Dict[str, int] = Counter()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            letters.update(word)
            parts.update([word[:i] for i in range(2, len(word) + 1)])
            parts.update([f"##{word[i:]}" for i in range(1, len(word) - 1)])
    known = sorted(letter for letter, count in letters.items() if count > 1)
    common = sorted(parts, key=lambda part: (-parts[part], part))[:150]
    pieces = [*special, *known, *(f"##{letter}" for letter in known), *sorted(common)]
    return {piece: i for i, piece in enumerate(pieces)}
