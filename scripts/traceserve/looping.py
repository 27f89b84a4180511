"""Models that are run token by token: the two graphs that are traced, and the original that they are compared with.

The graph `start` makes the state that a loop begins with: a decoder's empty past, or an encoder's output as the keys and
values that every decoder layer attends to. The graph `step` reads new tokens and the state; it gives the logits of the
last token and the state's first tensors, the past of self-attention, grown by these tokens. What of the state it does
not give back stays as it is. All of the state has the batch as its first dimension.
"""

from __future__ import annotations

import inspect
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
from traceserve_runtime.tasks.contract import Request
from traceserve_runtime.tokenization import Row

from traceserve.errors import ExportError
from traceserve.loading import Original
from traceserve.wrapping import example

Pairs = List[Tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, (batch, heads, length, size of a head)


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
    with torch.no_grad():
        result = original.model(input_ids=ids, attention_mask=mask, use_cache=True)
    past = _pairs(getattr(result, "past_key_values", None), original)
    step = _DecoderStep(original.model)
    states = tuple(tensor for pair in past for tensor in pair)
    whole = torch.cat([mask, torch.ones_like(mask)], dim=1)
    columns = {
        "input_ids": ids,
        "attention_mask": whole,
        "position_ids": (whole.cumsum(1) - 1).clamp(min=0)[:, length:],
    }
    start = Graph(_Empty(states), (ids, mask), ("input_ids", "attention_mask"))
    return start, Graph(step, (*(columns[name] for name in step.inputs), *states), step.inputs)


def _encoder_decoder_graphs(original: Original, batch: int, length: int) -> Tuple[Graph, Graph]:
    ids, mask = _example(original, batch, length)
    begin = _Begin(original)
    with torch.no_grad():
        states = begin(ids, mask)
    growing = len(states) // 2
    decoder_ids = ids[:, : min(4, length)]
    past = tuple(torch.randn(*t.shape[:2], 5, t.shape[3]).to(t.dtype) for t in states[:growing])
    step = _EncoderDecoderStep(original.model, growing // 2)
    return (
        Graph(begin, (ids, mask), ("input_ids", "attention_mask")),
        Graph(step, (decoder_ids, mask, *past, *states[growing:]), step.inputs),
    )


class _Empty(torch.nn.Module):
    """The prompt, ids and mask (batch, length), to a past of length 0."""

    def __init__(self, states: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.shapes = [(state.shape[1], state.shape[3], state.dtype) for state in states]

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return tuple(
            torch.zeros(input_ids.shape[0], heads, 0, size, device=input_ids.device, dtype=dtype)
            for heads, size, dtype in self.shapes
        )


class _DecoderStep(torch.nn.Module):
    """New tokens (batch, new), mask of all (batch, past + new), positions (batch, new) and the past, to the logits of the
    last token, (batch, vocabulary), and the grown past."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.inputs = tuple(n for n in ("input_ids", "attention_mask", "position_ids") if n in accepted)
        # Of the prompt, too, only the last token's logits are computed where the model can be told so.
        self.fixed = {name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in accepted}

    def forward(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        columns, past = tensors[: len(self.inputs)], tensors[len(self.inputs) :]
        result = self.model(
            **dict(zip(self.inputs, columns)),
            past_key_values=_cache(list(zip(past[::2], past[1::2]))),
            use_cache=True,
            return_dict=True,
            **self.fixed,
        )
        grown = read_cache(result.past_key_values)
        return (result.logits[:, -1].float(), *(tensor for pair in grown for tensor in pair))


class _Begin(torch.nn.Module):
    """The source, ids and mask (batch, length), to an empty past and each layer's keys and values of the source."""

    def __init__(self, original: Original) -> None:
        super().__init__()
        self.model = original.model
        self.encoder = original.model.get_encoder()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).last_hidden_state
        result = self.model(
            encoder_outputs=(hidden,),
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[
                :, :1
            ],  # what the decoder reads is no matter to the keys and values of the source
            use_cache=True,
            return_dict=True,
        )
        grown, source = _read_both(result.past_key_values)
        empty = [tensor[:, :, :0] for pair in grown for tensor in pair]
        return (*empty, *(tensor for pair in source for tensor in pair))


class _EncoderDecoderStep(torch.nn.Module):
    """New tokens (batch, new), the source's mask (batch, length), the past and the source's keys and values, to the logits
    of the last token, (batch, vocabulary), and the grown past."""

    inputs = ("decoder_input_ids", "attention_mask")

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.hidden_size = model.config.d_model

    def forward(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        decoder_input_ids, attention_mask = tensors[:2]
        past, source = tensors[2 : 2 + 2 * self.layers], tensors[2 + 2 * self.layers :]
        # Its keys and values are known, so that only the shape of the encoder's output is read.
        hidden = attention_mask[:, :, None].expand(-1, -1, self.hidden_size).to(past[0].dtype)
        result = self.model(
            encoder_outputs=(hidden,),
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            past_key_values=_cache_both(list(zip(past[::2], past[1::2])), list(zip(source[::2], source[1::2]))),
            use_cache=True,
            return_dict=True,
        )
        grown, _ = _read_both(result.past_key_values)
        return (result.logits[:, -1].float(), *(tensor for pair in grown for tensor in pair))


def _example(original: Original, batch: int, length: int) -> Tuple[torch.Tensor, torch.Tensor]:
    columns = dict(zip(original.inputs, example(original, batch, length)))
    return columns["input_ids"], columns["attention_mask"]


def _pairs(cache: Any, original: Original) -> Pairs:
    try:
        pairs = read_cache(cache)
        if pairs and all(tensor.dim() == 4 for pair in pairs for tensor in pair):
            return pairs
    except (AttributeError, TypeError, ValueError):
        pass
    raise ExportError(
        f"{type(original.model).__name__} keeps something else than keys and values between steps "
        f"({type(cache).__name__}), which cannot be traced"
    )


def _cache(pairs: Pairs) -> Any:
    """transformers' cache of these keys and values; before version 4.36 a tuple."""
    try:
        from transformers import cache_utils as untyped
    except ImportError:
        return tuple(pairs)
    cache_utils: Any = untyped
    cache = cache_utils.DynamicCache()
    for number, (keys, values) in enumerate(pairs):
        if not hasattr(cache_utils, "DynamicLayer"):  # before 4.54
            cache.update(keys, values, number)
            continue
        # Not by `update`, which would put a concatenation of the whole past into the graph.
        layer = cache_utils.DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def read_cache(cache: Any) -> Pairs:
    if isinstance(cache, tuple):
        return [(layer[0], layer[1]) for layer in cache]
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))


def _cache_both(past: Pairs, source: Pairs) -> Any:
    try:
        from transformers.cache_utils import EncoderDecoderCache
    except ImportError:
        return tuple((*one, *two) for one, two in zip(past, source))
    return EncoderDecoderCache(_cache(past), _cache(source))


def _read_both(cache: Any) -> Tuple[Pairs, Pairs]:
    if isinstance(cache, tuple):
        return read_cache(cache), [(layer[2], layer[3]) for layer in cache]
    return read_cache(cache.self_attention_cache), read_cache(cache.cross_attention_cache)


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
    own = ("return_full_text", "stream", "long_inputs", "seed", "stop")
    return {key: value for key, value in named.items() if key not in own and value is not None}


LOOPS: Dict[str, Loop] = {
    "decoder": Loop(_decoder_graphs, _decoder_forced, True),
    "encoder_decoder": Loop(_encoder_decoder_graphs, _encoder_decoder_forced, False),
}
