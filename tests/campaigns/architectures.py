"""Every architecture of transformers' tables: a tiny random checkpoint of each is built, and its texts equal `generate`'s.

    python -m campaigns.architectures [--task text_generation ...] [--only gemma3_text ...] [--at-once 2] [--page FILE.md]

Each in a process of its own, with a limit of time and memory. What cannot be made tiny by its configuration's sizes alone is
listed, and tried by nobody. A model that is refused has a reason; an unexpected exception, or another text, misses the aim.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import resource
import signal
import sys
import tempfile
import warnings
import zlib
from collections import Counter, deque
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, NoReturn, Sequence, Tuple

import models
import torch
import transformers
from oracle import written
from rich.progress import track
from traceserve import api
from traceserve_runtime.errors import TraceserveError
from transformers.models.auto import modeling_auto

from campaigns.aims import LABELS, Aim, main_of, none_of

EQUAL, OTHER, REFUSED, FAILED, NOT_MADE, ENDED = "equal", "another text", "refused", "failed", "not made", "ended"
_STATES = {
    EQUAL: "Built",
    OTHER: "Built, but with another text than `generate`'s",
    REFUSED: "Refused",
    FAILED: "Failed",
    NOT_MADE: "Not tried, since setting the sizes gives no tiny checkpoint",
    ENDED: "Not tried, since even that takes too much time or memory",
}
MAX_LENGTH, WINDOW, NEW_TOKENS = 120, 48, 24  # texts are longer than the windows of those that have some
_SECONDS, _BYTES, _WEIGHTS = 300, 8 << 30, 30e6  # limits of one
_TEXTS = ("The boat lay in the old harbour, and nobody saw it.", "Yes", "A letter came. " * 10)


class Kind(NamedTuple):
    """A task's models: transformers' table and auto class, the tokenizer (`models.make_tokenizer`), and whether it writes,
    with which parameters."""

    table: str
    auto_model: str
    tokenizer: str
    writes: bool = False
    parameters: Mapping[str, Any] = {}


KINDS = {
    "text_generation": Kind("CAUSAL_LM", "AutoModelForCausalLM", "gpt", True, {"return_full_text": False}),
    "text2text_generation": Kind("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM", "t5", True),
    "sequence_classification": Kind("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification", "bert"),
    "token_classification": Kind("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification", "bert"),
    "question_answering": Kind("QUESTION_ANSWERING", "AutoModelForQuestionAnswering", "bert"),
    "fill_mask": Kind("MASKED_LM", "AutoModelForMaskedLM", "bert"),
}

# Sizes by their names in configurations; those that a configuration has are set.
_SIZES: Dict[int, str] = {
    1: "n_group topk_group max_window_layers first_k_dense_replace",
    2: "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers num_key_value_heads "
    "num_kv_heads num_global_key_value_heads num_experts_per_tok linear_num_key_heads mamba_n_groups n_groups",
    3: "conv_L_cache",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts rotary_dim linear_num_value_heads",
    8: "head_dim d_kv d_head attention_head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "query_pre_attn_scalar linear_key_head_dim linear_value_head_dim mamba_d_state state_size ssm_state_size mamba_n_heads "
    "mamba_d_head mamba_num_heads mamba_head_dim hidden_size_per_layer_input",
    16: "q_lora_rank kv_lora_rank mamba_chunk_size chunk_size",
    32: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size word_embed_proj_dim lru_width moe_intermediate_size "
    "shared_expert_intermediate_size expert_ffn_hidden_size",
    64: "intermediate_size n_inner ffn_dim d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_inner mamba_d_ssm",
    160: "max_position_embeddings n_positions max_seq_len n_ctx max_seq_length",
    WINDOW: "sliding_window attention_window_size local_attention attention_chunk_size",
}
# What other sizes follow from, or what has no name of its own.
_OWN: Dict[str, Dict[str, Any]] = {
    **dict.fromkeys(
        ("deepseek_v3", "axk1", "axk2", "youtu", "deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "longcat_flash"),
        {"num_key_value_heads": 4},
    ),
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    # Their last layers have the keys and values of earlier ones.
    **dict.fromkeys(
        ("gemma3n_text", "gemma4_text"),
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "nemotron": {"num_key_value_heads": 2},
    **dict.fromkeys(("ministral", "hunyuan_v1_dense", "hunyuan_v1_moe"), {"head_dim": 8}),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), {"num_hidden_layers": 4}),
    **dict.fromkeys(("lfm2", "lfm2_moe"), {"layer_types": ["conv", "full_attention"]}),
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "nemotron_h": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"]},
    "mamba2": {"num_heads": 8},
}


class Outcome(NamedTuple):
    """What became of one: its `state` is one of those above."""

    task: str
    name: str
    state: str
    why: str = ""


def campaign(options: argparse.Namespace, folder: Path) -> Sequence[Aim]:
    cases = [(task, name) for task in options.task for name in names_of(task) if name in (options.only or [name])]
    tried = track(outcomes(cases, options.at_once), "architectures", len(cases), disable=not sys.stderr.isatty())
    found = sorted(tried, key=lambda each: cases.index((each.task, each.name)))
    for each in found:
        if each.state in (OTHER, FAILED, ENDED):
            print(*each)
    if options.page is not None:
        options.page.write_text(page_of(found), encoding="utf-8")
    states = Counter(each.state for each in found)
    made = len(found) - states[NOT_MADE] - states[ENDED]
    return [
        none_of("built, and another text than `generate`'s", states[OTHER], made),
        none_of("an exception that is no reason", states[FAILED], made),
        Aim("built, and equal", "-", f"{states[EQUAL]:,} of {made:,}", True),
        Aim("refused, with a reason", "-", f"{states[REFUSED]:,} of {made:,}", True),
        Aim(
            "not made tiny; beyond the limits", "-", f"{states[NOT_MADE]:,}; {states[ENDED]:,} of {len(found):,}", True
        ),
    ]


def page_of(found: Sequence[Outcome]) -> str:
    """Return a Markdown page of all outcomes, those with a reason by it."""
    lines = [f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}."]
    for task in dict.fromkeys(each.task for each in found):
        lines += ["", f"## {task}"]
        for state, what in _STATES.items():
            names: Dict[str, List[str]] = {}
            for each in found:
                if (each.task, each.state) == (task, state):
                    names.setdefault(_reason_of(each), []).append(f"`{each.name}`")
            for why, some in names.items():
                lines += ["", f"{what}{why} ({len(some)}): {', '.join(some)}."]
    return "\n".join(lines) + "\n"


def _reason_of(outcome: Outcome) -> str:
    """Return the reason of what was refused, or failed, without the model's own name, and without what to do."""
    if outcome.state not in (REFUSED, FAILED):
        return ""
    why = re.sub(r"\b[A-Z]\w+(For[A-Z]\w+|Model|Decoder)\b", "the model", outcome.why)
    return ", " + why.partition(", so n")[0].partition(" (in float32")[0].partition(": 0 INTERNAL")[0]


def names_of(task: str) -> List[str]:
    """Return the types of models that transformers' table has for this task."""
    return sorted(getattr(modeling_auto, f"MODEL_FOR_{KINDS[task].table}_MAPPING_NAMES"))


def outcomes(cases: Sequence[Tuple[str, str]], at_once: int) -> Iterator[Outcome]:
    """Try each in a process of its own, a few at once; those that end first come first."""
    waiting = deque(cases)
    running: Dict[int, Tuple[Tuple[str, str], int]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            case = waiting.popleft()
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                _tried(*case, writing)
            os.close(writing)
            running[child] = case, reading
        child, _ = os.wait()
        case, reading = running.pop(child)
        with os.fdopen(reading, "rb") as pipe:
            content = pipe.read()
        yield Outcome(*case, *json.loads(content)) if content else Outcome(*case, ENDED, "time or memory")


def _tried(task: str, name: str, writing: int) -> NoReturn:
    """Write an outcome's state and reason into a pipe, and end this process."""
    resource.setrlimit(resource.RLIMIT_DATA, (_BYTES, _BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_SECONDS)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="architecture-") as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _try(task, name, Path(place))
    os.write(writing, json.dumps(found).encode())
    os._exit(0)


def _try(task: str, name: str, place: Path) -> Sequence[str]:
    try:
        expected = _original_texts(task, _checkpoint(task, name, place / "checkpoint"))
    except Exception as error:  # a configuration that does not fit together
        return NOT_MADE, _in_a_line(error)
    try:
        built = api.build(
            str(place / "checkpoint"), task=task, max_length=MAX_LENGTH, store=place / "store", output=place / "made"
        )
        if KINDS[task].writes:
            parameters = {"max_new_tokens": NEW_TOKENS, "num_beams": 1, **KINDS[task].parameters}
            answers = [api.load(built)({"text": text}, **parameters) for text in _TEXTS]
            texts = [written(answer).strip() for answer in answers]
            if texts != expected:
                return OTHER, str(next(pair for pair in zip(texts, expected) if pair[0] != pair[1]))[:200]
    except TraceserveError as error:
        return REFUSED, _in_a_line(error)
    except Exception as error:
        return FAILED, f"{type(error).__name__}: {_in_a_line(error)}"
    return EQUAL, ""


def _checkpoint(task: str, name: str, folder: Path) -> Path:
    """Write a tiny random checkpoint, by a configuration's names alone; raises what transformers does."""
    kind = KINDS[task]
    texts_end = not kind.writes and getattr(transformers.CONFIG_MAPPING[name](), "is_encoder_decoder", False)
    tokenizer = models.make_tokenizer("roberta" if texts_end else kind.tokenizer)  # their classifiers read at an end
    config = _config(name, tokenizer, LABELS if "classification" in task else {})
    model = getattr(transformers, kind.auto_model).from_config(config).float()
    if sum(parameter.numel() for parameter in model.parameters()) > _WEIGHTS:
        raise ValueError("its sizes have other names, so that it is large")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            drawn = torch.empty(parameter.shape).normal_(
                generator=torch.Generator().manual_seed(zlib.crc32(path.encode()))
            )
            one = float(path.endswith("weight"))
            parameter.copy_(drawn * 0.1 if drawn.dim() > 1 else drawn * 0.1 + one)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(name: str, tokenizer: Any, options: Dict[str, Any]) -> Any:
    kind = transformers.CONFIG_MAPPING[name]
    default = kind()
    known = {key: size for size, keys in _SIZES.items() for key in keys.split()}
    content = default.to_dict()
    sizes = {key: size for key, size in known.items() if content.get(key) is not None}
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "bos", "eos")}
    starts = {"decoder_start_token_id": tokenizer.eos_token_id} if getattr(default, "is_encoder_decoder", False) else {}
    given = {"vocab_size": len(tokenizer), **sizes, **ids, **starts, **options, **_OWN.get(name, {})}
    try:
        return kind(**given)
    except (AttributeError, TypeError, ValueError):  # one layer of each kind, if it lists them
        kinds = list(dict.fromkeys(default.layer_types))
        layers = (kinds * 2)[: max(2, len(kinds))]
        return kind(**{**given, "layer_types": layers, "num_hidden_layers": len(layers)})


def _original_texts(task: str, folder: Path) -> List[str]:
    """Return the texts that transformers writes; none for a task that writes none, whose model is only run."""
    kind = KINDS[task]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, kind.auto_model).from_pretrained(folder).float().eval()
    texts = []
    for text in _TEXTS:
        inputs = dict(tokenizer(text, return_tensors="pt"))
        inputs = {key: value for key, value in inputs.items() if key in inspect.signature(model.forward).parameters}
        if not kind.writes:
            with torch.no_grad():
                model(**inputs)
            continue
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)[0]
        begin = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        texts.append(str(tokenizer.decode(ids[begin:], skip_special_tokens=True)).strip())
    return texts


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def options_of(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", nargs="+", default=list(KINDS), choices=list(KINDS), help="[all]")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types of models alone")
    parser.add_argument("--at-once", type=int, default=2, help="processes [%(default)s]")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write all outcomes as a Markdown page")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.exit(main_of(campaign, __doc__, options_of))
