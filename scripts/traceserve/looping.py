"""Models that are run token by token: the two graphs that are traced, and the original that they are compared with.

The graphs `start` and `step` are the calls of `runtimes.calling`, which says what they take and give.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
from traceserve_runtime.runtimes.calling import Begin, DecoderStep, Empty, EncoderDecoderStep, read_past
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.tasks.parameters import strings
from traceserve_runtime.tokenization import Row

from traceserve.errors import ExportError
from traceserve.loading import Original
from traceserve.wrapping import Wrapped, example


class Graph(NamedTuple):
    """A module to be traced, an example of its inputs, and their names where the runner passes them by name."""

    module: torch.nn.Module
    example: Tuple[torch.Tensor, ...]
    inputs: Tuple[str, ...]


class Loop(NamedTuple):
    """How one kind of model is traced, and what its original gives.

    `graphs(original, batch, length)` makes start and step; `forced(original, row, steps)` the logits, (steps + 1,
    vocabulary), where the original is made to read `steps` given tokens. `writes_behind`: whether new
    tokens stand behind the row, and count towards max_length with it.
    """

    graphs: Callable[[Original, int, int], Tuple[Graph, Graph]]
    forced: Callable[[Original, Row, int], torch.Tensor]
    writes_behind: bool


def _decoder_graphs(original: Original, batch: int, length: int) -> Tuple[Graph, Graph]:
    ids, mask = _example(original, batch, length)
    states = read_past(original.model, ids, mask)
    if states is None:
        raise ExportError(
            f"{type(original.model).__name__} keeps something else than keys and values between steps, which cannot be "
            "written out"
        )
    step = DecoderStep(original.model)
    whole = torch.cat([mask, torch.ones_like(mask)], dim=1)
    columns = {
        "input_ids": ids,
        "attention_mask": whole,
        "position_ids": (whole.cumsum(1) - 1).clamp(min=0)[:, length:],
    }
    start = Graph(Wrapped(Empty(states)), (ids, mask), ("input_ids", "attention_mask"))
    return start, Graph(Wrapped(step), (*(columns[name] for name in step.inputs), *states), step.inputs)


def _encoder_decoder_graphs(original: Original, batch: int, length: int) -> Tuple[Graph, Graph]:
    ids, mask = _example(original, batch, length)
    begin, step = Begin(original.model), EncoderDecoderStep(original.model)
    with torch.no_grad():
        states = begin(ids, mask)
    growing = len(states) // 2
    decoder_ids = ids[:, : min(4, length)]
    past = tuple(torch.randn(*t.shape[:2], 5, t.shape[3]).to(t.dtype) for t in states[:growing])
    return (
        Graph(Wrapped(begin), (ids, mask), ("input_ids", "attention_mask")),
        Graph(Wrapped(step), (decoder_ids, mask, *past, *states[growing:]), step.inputs),
    )


def _example(original: Original, batch: int, length: int) -> Tuple[torch.Tensor, torch.Tensor]:
    columns = dict(zip(original.inputs, example(original, batch, length)))
    return columns["input_ids"], columns["attention_mask"]


def forced_tokens(row: Row, steps: int) -> List[int]:
    """Tokens that a model is made to go on with, whatever it would write."""
    return (row.encoding.ids * steps)[:steps]


def _decoder_forced(original: Original, row: Row, steps: int) -> torch.Tensor:
    ids = torch.tensor([[*row.encoding.ids, *forced_tokens(row, steps)]])
    logits: torch.Tensor = original.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits[row.length - 1 :]


def _encoder_decoder_forced(original: Original, row: Row, steps: int) -> torch.Tensor:
    ids = torch.tensor([row.encoding.ids])
    begin = torch.tensor([[original.facts["start_id"], *forced_tokens(row, steps)]])
    logits: torch.Tensor = original.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=begin, use_cache=False
    ).logits[0]
    return logits


def generate(original: Original, loop: str, row: Row, request: Request) -> List[int]:
    """The ids of the original's own `generate` after one row, new ones only."""
    ids = torch.tensor([row.encoding.ids])
    options = _generate_options(original, request)
    tokens: List[int] = original.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return tokens[row.length if LOOPS[loop].writes_behind else 1 :]


def _generate_options(original: Original, request: Request) -> Dict[str, Any]:
    """The parameters of a request as `generate` takes them."""
    named = {**original.parameters, **request.parameters}
    own = ("return_full_text", "stream", "long_inputs", "seed", "stop", "src_lang", "tgt_lang")
    options = {key: value for key, value in named.items() if key not in own and value is not None}
    if named.get("tgt_lang") is not None:
        options["forced_bos_token_id"] = original.facts["languages"][named["tgt_lang"]]
    if named.get("stop") is not None:
        options.update(stop_strings=strings(named["stop"]), tokenizer=original.tokenizer)
    return options


LOOPS: Dict[str, Loop] = {
    "decoder": Loop(_decoder_graphs, _decoder_forced, True),
    "encoder_decoder": Loop(_encoder_decoder_graphs, _encoder_decoder_forced, False),
}
