"""Calls of transformers models: positional tensors in, a tuple of tensors out.

The builder traces these calls, and the reader of the save mode pretrained makes them. A model that runs once is called
by `Single`. One that runs token by token has two calls. `start` makes the loop's initial state: a decoder's empty
cache, or an encoder's output as the keys and values that every decoder layer attends to. `step` reads new tokens and
the state; it returns the last token's logits and the state's first tensors, the self-attention cache extended by these
tokens. The rest of the state is unchanged. All of the state has the batch as its first dimension.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Tensors = Tuple[torch.Tensor, ...]
    # Each layer's keys and values, (batch, heads, length, head size).
    Pairs = List[Tuple[torch.Tensor, torch.Tensor]]

# Classifiers that read the hidden state of each row's last end token, and search for all of them at once: in a batch
# whose rows have different numbers of end tokens that fails, or mixes up rows.
_READS_END_TOKENS = {
    f"{family}ForSequenceClassification"
    for family in ("Bart", "MBart", "PLBart", "Mvp", "BigBirdPegasus", "T5", "MT5", "UMT5")
}


class Single:
    """Calls the model by keyword, without a cache, and returns a tuple of float32 tensors in the order of `outputs`.

    transformers 5 has no torchscript flag. Positional calls depend on each model's order of arguments, and
    `config.return_dict=False` breaks GPT-2, Llama and ModernBERT.
    """

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.model = model
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.run = _way(model, self.inputs, self.outputs)
        accepted = inspect.signature(model.forward).parameters
        self.fixed = {"use_cache": False} if "use_cache" in accepted else {}

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        """`tensors` as `inputs`, int64 of shape (batch, length)."""
        result = self.run(self.model, dict(zip(self.inputs, tensors)), self.fixed)
        return tuple(result[name].float() for name in self.outputs)


def _way(
    model: PreTrainedModel, inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[..., Mapping[str, torch.Tensor]]:
    """Return how to run a model so that each row of a batch is answered as if alone."""
    if type(model).__name__ in _READS_END_TOKENS:
        return _by_last_end_token
    if tuple(outputs) == ("logits",) and pad_id(model) is None and _reads_last_token(model, inputs):
        return _by_last_token
    return _by_itself


def pad_id(model: PreTrainedModel) -> Optional[int]:
    """Return the padding token in a model's configuration; None if it is not in its vocabulary."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    found = getattr(config, "pad_token_id", None)
    known = isinstance(found, int) and 0 <= found < (getattr(config, "vocab_size", None) or 0)
    return found if known else None


def _reads_last_token(model: PreTrainedModel, inputs: Sequence[str]) -> bool:
    """Return whether a model classifies a row by its last token, like those on a decoder; determined by running it.

    In a batch these search for the last token that is not padding, by its id. Without a padding id they refuse a batch,
    or read padding as text.
    """
    import torch

    if "attention_mask" not in inputs:
        return False
    device = next(model.parameters()).device
    ids = torch.arange(3, device=device)[None]
    columns = {name: torch.ones_like(ids) if name == "attention_mask" else torch.zeros_like(ids) for name in inputs}
    columns["input_ids"] = ids
    accepted = inspect.signature(model.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in accepted else {}
    with torch.no_grad():
        alone = _by_itself(model, columns, fixed)["logits"].float()
        try:
            found = _by_last_token(model, columns, fixed)["logits"].float()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # its layers are arranged differently
    # Equal up to rounding; any other token's would differ.
    return alone.shape == found.shape and torch.allclose(alone, found, rtol=1e-2, atol=1e-2)


def _by_last_token(
    model: PreTrainedModel, columns: Dict[str, torch.Tensor], fixed: Dict[str, bool]
) -> Dict[str, torch.Tensor]:
    """Classify each row's last token, by its mask: the backbone, then the following layers, in order."""
    import torch

    name = model.base_model_prefix
    backbone = getattr(model, name)
    hidden = backbone(**columns, **fixed, return_dict=True).last_hidden_state
    mask = columns["attention_mask"]
    places = torch.arange(mask.shape[1], device=mask.device)
    rows = torch.arange(mask.shape[0], device=mask.device)
    hidden = hidden[rows, (mask * places).argmax(dim=1)]
    for own, layer in model.named_children():
        if own != name:
            hidden = layer(hidden)
    return {"logits": hidden}


def _by_itself(
    model: PreTrainedModel, columns: Dict[str, torch.Tensor], fixed: Dict[str, bool]
) -> Mapping[str, torch.Tensor]:
    outputs: Mapping[str, torch.Tensor] = model(**columns, **fixed, return_dict=True)
    return outputs


def _by_last_end_token(
    model: PreTrainedModel, columns: Dict[str, torch.Tensor], fixed: Dict[str, bool]
) -> Dict[str, torch.Tensor]:
    """Classify likewise, searching for the last end token in each row separately."""
    import torch

    ids = columns["input_ids"]
    if hasattr(model, "transformer"):  # T5 and its kin
        backbone, given = model.get_submodule("transformer"), {"decoder_input_ids": _shifted_right(model, ids)}
    else:
        backbone, given = model.get_submodule("model"), {}
    hidden = backbone(**columns, **given, use_cache=False, return_dict=True).last_hidden_state
    places = torch.arange(ids.shape[1], device=ids.device)
    last = (ids.eq(model.config.eos_token_id) * places).argmax(dim=1)
    rows = torch.arange(ids.shape[0], device=ids.device)
    return {"logits": model.get_submodule("classification_head")(hidden[rows, last])}


def _shifted_right(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the input with which T5's decoder reads `ids`: a start token, and all of them but the last.

    `_shift_right` is a private name of transformers' T5 and its kin (4.26 to 5.23), which the model itself calls.
    Without it the same is done here.
    """
    own: Optional[Callable[[torch.Tensor], torch.Tensor]] = getattr(model, "_shift_right", None)
    if own is not None:
        return own(ids)
    shifted = ids.roll(1, dims=1)
    shifted[:, 0] = model.config.decoder_start_token_id
    return shifted


class Empty:
    """Maps the prompt, ids and mask (batch, length), to an empty cache like `past`, a decoder's own after any
    tokens."""

    def __init__(self, past: Sequence[torch.Tensor]) -> None:
        self.shapes = [(tensor.shape[1], tensor.shape[3], tensor.dtype) for tensor in past]

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Tensors:
        import torch

        return tuple(
            torch.zeros(input_ids.shape[0], heads, 0, size, device=input_ids.device, dtype=dtype)
            for heads, size, dtype in self.shapes
        )


class DecoderStep:
    """Maps new tokens (batch, new), the mask of all (batch, past + new), positions (batch, new) and the cache to the
    last token's logits, (batch, vocabulary), and the extended cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.inputs = tuple(n for n in ("input_ids", "attention_mask", "position_ids") if n in accepted)
        # For the prompt, too, only the last token's logits are computed if the model supports it.
        self.fixed = {name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in accepted}

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
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


def read_past(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Optional[Tensors]:
    """Return a decoder's cache after these tokens; None if it keeps something other than keys and values between
    steps."""
    import torch

    with torch.no_grad():
        result = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True)
    try:
        pairs = read_cache(getattr(result, "past_key_values", None))
    except (AttributeError, TypeError, ValueError):
        return None
    past = tuple(tensor for pair in pairs for tensor in pair)
    return past if past and all(getattr(tensor, "ndim", 0) == 4 for tensor in past) else None


def encoded(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the encoder's output for the source, ids and mask (batch, length): (batch, length, size).

    LED reads whole attention windows, and pads the source to them in a Python branch that a trace does not keep.
    """
    import torch

    length = input_ids.shape[1]
    window = getattr(model.config, "attention_window", None)
    if window:
        missing = -length % (window if isinstance(window, int) else max(window))
        input_ids = torch.nn.functional.pad(input_ids, (0, missing), value=pad_id(model) or 0)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    result = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
    hidden: torch.Tensor = result.last_hidden_state[:, :length]
    return hidden


def encoder_outputs(hidden: torch.Tensor) -> object:
    """Wrap an encoder's output for models: by index or by name; some also read its experts' routes."""
    from transformers.modeling_outputs import MoEModelOutput

    return MoEModelOutput(last_hidden_state=hidden)


class Begin:
    """Maps the source, ids and mask (batch, length), to an empty cache and each layer's keys and values of the
    source."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Tensors:
        result = self.model(
            encoder_outputs=encoder_outputs(encoded(self.model, input_ids, attention_mask)),
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :1],  # any token: it does not affect the source's keys and values
            use_cache=True,
            return_dict=True,
        )
        grown, source = _read_both(result.past_key_values)
        empty = [tensor[:, :, :0] for pair in grown for tensor in pair]
        return (*empty, *(tensor for pair in source for tensor in pair))


class EncoderDecoderStep:
    """Maps new tokens (batch, new), the source's mask (batch, length), the cache and the source's keys and values to
    the last token's logits, (batch, vocabulary), and the extended cache."""

    inputs = ("decoder_input_ids", "attention_mask")

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # An EncoderDecoderModel's own configuration has none.
        encoder = getattr(model.get_encoder(), "config", model.config)
        self.hidden_size = encoder.hidden_size

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        decoder_input_ids, attention_mask = tensors[:2]
        state = tensors[2:]
        past, source = state[: len(state) // 2], state[len(state) // 2 :]
        # Its keys and values are known, so only the shape of the encoder's output is read.
        hidden = attention_mask[:, :, None].expand(-1, -1, self.hidden_size).to(past[0].dtype)
        result = self.model(
            encoder_outputs=encoder_outputs(hidden),
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            past_key_values=_cache_both(list(zip(past[::2], past[1::2])), list(zip(source[::2], source[1::2]))),
            use_cache=True,
            return_dict=True,
        )
        grown, _ = _read_both(result.past_key_values)
        return (result.logits[:, -1].float(), *(tensor for pair in grown for tensor in pair))


def _cache(pairs: Pairs) -> object:
    """Return transformers' cache of these keys and values; before version 4.36 a tuple."""
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
        # Not with `update`, which would put a concatenation of the whole cache into the graph.
        layer = cache_utils.DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
        layer.is_initialized = True
        cache.layers.append(layer)
    return cache


def read_cache(cache: Any) -> Pairs:
    """Return each layer's keys and values, from any version's cache."""
    if isinstance(cache, tuple):
        return [(layer[0], layer[1]) for layer in cache]
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))


def _cache_both(past: Pairs, source: Pairs) -> object:
    try:
        from transformers.cache_utils import EncoderDecoderCache
    except ImportError:
        return tuple((*one, *two) for one, two in zip(past, source))
    return EncoderDecoderCache(_cache(past), _cache(source))


def _read_both(cache: Any) -> Tuple[Pairs, Pairs]:
    if isinstance(cache, tuple):
        return read_cache(cache), [(layer[2], layer[3]) for layer in cache]
    return read_cache(cache.self_attention_cache), read_cache(cache.cross_attention_cache)
