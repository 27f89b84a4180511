"""The original of a looping model: its logits after given tokens, and its generated texts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Sequence

import torch
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.tasks.parameters import strings
from traceserve_runtime.texts.rows import Row

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.loops import LOOPS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

_PENALTIES = ("presence_penalty", "frequency_penalty")  # which transformers lacks


def forced_tokens(row: Row, steps: int) -> List[int]:
    """Return tokens to force on a model, whatever it would write."""
    return (row.encoding.ids * steps)[:steps]


def _decoder_forced(original: Original, row: Row, tokens: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([[*row.encoding.ids, *tokens]])
    logits: torch.Tensor = original.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits[row.length - 1 :]


def _encoder_decoder_forced(original: Original, row: Row, tokens: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor([row.encoding.ids])
    begin = torch.tensor([[original.facts["start_id"], *tokens]])
    logits: torch.Tensor = original.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=begin, use_cache=False
    ).logits[0]
    return logits


def generate_original(original: Original, loop: str, row: Row, request: Request) -> List[int]:
    """Return the ids of the original's own `generate` for one row, only new ones."""
    ids = torch.tensor([row.encoding.ids])
    options = _generate_options(original, request, row.length if LOOPS[loop].writes_behind else 1)
    model: Any = original.model  # its types lack `generate`, which a mixin adds
    tokens: List[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return tokens[row.length if LOOPS[loop].writes_behind else 1 :]


def _generate_options(original: Original, request: Request, begin: int) -> Dict[str, object]:
    """Return a request's parameters in `generate`'s format; what it writes begins at the position `begin`."""
    named = {**original.parameters, **request.parameters}
    own = (
        "return_full_text",
        "stream",
        "long_inputs",
        "truncate",
        "seed",
        "stop",
        "src_lang",
        "tgt_lang",
        "details",
        "top_n_tokens",
        "logit_bias",
        *_PENALTIES,
    )
    options = {key: value for key, value in named.items() if key not in own and value is not None}
    if named.get("tgt_lang") is not None:
        options["forced_bos_token_id"] = original.facts["languages"][named["tgt_lang"]]
    if named.get("stop") is not None:
        options["stopping_criteria"] = _stopping_criteria(original.tokenizer, strings(named["stop"]), begin)
    if named.get("logit_bias"):
        options["sequence_bias"] = [[[int(token)], float(added)] for token, added in named["logit_bias"].items()]
    presence, frequency = (float(named.get(name) or 0.0) for name in _PENALTIES)
    if presence or frequency:
        options["logits_processor"] = [partial(_penalized, presence, frequency, begin)]
    return options


def _penalized(presence: float, frequency: float, begin: int, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the scores less OpenAI's penalties for what was written, from the position `begin` on."""
    times = torch.zeros_like(scores).scatter_add_(
        1, ids[:, begin:], torch.ones_like(ids[:, begin:], dtype=scores.dtype)
    )
    return scores - presence * (times > 0) - frequency * times


def _stopping_criteria(tokenizer: PreTrainedTokenizerBase, stops: List[str], begin: int) -> StoppingCriteriaList:
    """Return what stops `generate` after one of these strings.

    transformers' own criterion writes each token behind "abcdef", and raises ValueError for a tokenizer whose
    vocabulary lacks these letters.
    """
    from transformers import StoppingCriteriaList, StopStringCriteria

    try:
        return StoppingCriteriaList([StopStringCriteria(tokenizer, stops)])
    except ValueError:
        return StoppingCriteriaList([partial(_has_stopped, tokenizer, stops, begin)])


def _has_stopped(
    tokenizer: PreTrainedTokenizerBase,
    stops: List[str],
    begin: int,
    ids: torch.Tensor,
    scores: torch.Tensor,
    **_: object,
) -> torch.Tensor:
    """Return for each row of ids whether its text, special tokens included, has a stop string that ends behind the position
    `begin`."""
    found = []
    for row in ids:
        before, text = (tokenizer.decode(tokens, clean_up_tokenization_spaces=False) for tokens in (row[:begin], row))
        found.append(any(stop in text[max(0, len(before) - len(stop) + 1) :] for stop in stops))
    return torch.tensor(found)


# The logits, (tokens + 1, vocabulary), when the original reads these tokens after one row.
FORCED: Dict[str, Callable[[Original, Row, Sequence[int]], torch.Tensor]] = {
    "decoder": _decoder_forced,
    "encoder_decoder": _encoder_decoder_forced,
}
