"""Tiny random models, one for each architecture, with a small tokenizer of their own; as folders of Hugging Face."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from traceserve.samples import SENTENCES, VERY_LONG

SIZE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
}


class Architecture(NamedTuple):
    """A family: its configuration class, the kind of its tokenizer, what its configuration is given."""

    config: str
    tokenizer: str  # of make_tokenizer
    options: Dict[str, Any]


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
}


def make(
    folder: Path, architecture: str, auto_model: str = "AutoModelForSequenceClassification", **options: Any
) -> Path:
    """Write a tiny random checkpoint into `folder`; `options` go into its configuration."""
    family = ARCHITECTURES[architecture]
    tokenizer = make_tokenizer(family.tokenizer)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    config = getattr(transformers, family.config)(
        vocab_size=len(tokenizer),
        **{**family.options, **{f"{name}_token_id": value for name, value in ids.items()}, **options},
    )
    torch.manual_seed(0)
    model = getattr(transformers, auto_model).from_config(config)
    with torch.no_grad():  # wide apart: small random weights give all texts nearly one answer
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(kind: str) -> Any:
    """A fast tokenizer trained on the samples: "bert" and "wordpiece" (without types), "roberta" and "gpt" (byte-level BPE)."""
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
    }[kind]
    inputs = ["input_ids", "attention_mask"] + (["token_type_ids"] if typed else [])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_trained(kind, tuple(dict.fromkeys(special.values())))),
        model_max_length=160 if kind != "roberta" else 150,
        model_input_names=inputs,
        **{f"{name}_token": token for name, token in special.items()},
    )


@lru_cache(maxsize=None)
def _trained(kind: str, special: tuple) -> str:
    texts = [*SENTENCES, VERY_LONG]
    if kind == "bert":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(special), show_progress=False)
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
    return tokenizer.to_str()
