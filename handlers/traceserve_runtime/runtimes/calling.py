"""Calls of transformers models: positional tensors in, a tuple of tensors out.

The builder traces these calls, and the reader of the save mode pretrained makes them. A model that runs once is called
by `Single`. One that runs token by token has two calls. `start` makes the loop's initial state: a decoder's empty
cache, or an encoder's output as the keys and values that every decoder layer attends to. `step` reads new tokens and
the state; it returns the last token's logits and the state's first tensors, the self-attention cache extended by these
tokens. The rest of the state is unchanged; a decoder has none. All of the state has the batch as its first dimension.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

from traceserve_runtime.runtimes import caches
from traceserve_runtime.runtimes.caches import LayerStates, Past

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Tensors = Tuple[torch.Tensor, ...]

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
    positions = torch.arange(mask.shape[1], device=mask.device)
    rows = torch.arange(mask.shape[0], device=mask.device)
    hidden = hidden[rows, (mask * positions).argmax(dim=1)]
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
    positions = torch.arange(ids.shape[1], device=ids.device)
    last = (ids.eq(model.config.eos_token_id) * positions).argmax(dim=1)
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

    def __init__(self, past: Past) -> None:
        growing = [((tensor.shape[1], 0, tensor.shape[3]), tensor.dtype) for tensor in past.growing]
        self.shapes = [*growing, *((tuple(tensor.shape[1:]), tensor.dtype) for tensor in past.fixed)]

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Tensors:
        import torch

        return tuple(
            torch.zeros(input_ids.shape[0], *shape, device=input_ids.device, dtype=dtype)
            for shape, dtype in self.shapes
        )


class DecoderStep:
    """Maps new tokens (batch, new), the mask of all (batch, past + new), positions (batch, new) and the cache to the
    last token's logits, (batch, vocabulary), and the extended cache; `layers` as of `Past`."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[LayerStates] = ()) -> None:
        self.model = model
        self.layers = tuple(layers)
        self.empty_cache: Any = caches.own_cache(model) if layers else None
        self.cache_name = _cache_name(model)
        accepted = inspect.signature(model.forward).parameters
        self.inputs = tuple(n for n in ("input_ids", "attention_mask", "position_ids") if n in accepted)
        # For the prompt, too, only the last token's logits are computed if the model supports it.
        self.fixed = {name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in accepted}

    def __call__(self, *tensors: torch.Tensor) -> Tensors:
        columns, past = dict(zip(self.inputs, tensors)), tensors[len(self.inputs) :]
        if self.layers:
            growing = 2 * sum(layer.attends for layer in self.layers)
            cache: Any = self.empty_cache()
            caches.fill_cache(cache, Past(past[:growing], past[growing:], self.layers))
        else:
            cache = caches.cache_of(list(zip(past[::2], past[1::2])))
        result = self.model(**columns, **{self.cache_name: cache}, use_cache=True, return_dict=True, **self.fixed)
        grown = getattr(result, self.cache_name)
        tensors = caches.read_own_cache(grown).tensors if self.layers else _flat(caches.read_cache(grown))
        return (result.logits[:, -1].float(), *tensors)


def read_past(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, with_fixed: bool = False
) -> Optional[Past]:
    """Return a decoder's cache after these tokens; None if it keeps something other than keys and values between steps,
    or than these and tensors of a fixed size, if `with_fixed`."""
    import torch

    own = caches.own_cache(model) if with_fixed else None
    cache = caches.empty_cache() if own is None else own()
    columns = {"input_ids": input_ids, "attention_mask": attention_mask}
    name = _cache_name(model)
    with torch.no_grad():
        result = model(**columns, **{name: cache}, use_cache=True)
    grown = getattr(result, name, None)
    if own is not None:
        past = caches.read_own_cache(grown)
        return past if past.layers and past.fixed else None
    try:
        tensors = _flat(caches.read_cache(grown))
    except (AttributeError, TypeError, ValueError):
        return None
    return Past(tensors) if tensors and all(getattr(tensor, "ndim", 0) == 4 for tensor in tensors) else None


def _cache_name(model: PreTrainedModel) -> str:
    """Return how a model names its cache, in its arguments and outputs: Mamba differs."""
    return "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"


def _flat(pairs: caches.Pairs) -> Tensors:
    return tuple(tensor for pair in pairs for tensor in pair)


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
        grown, source = caches.read_both(result.past_key_values)
        empty = [tensor[:, :, :0] for pair in grown for tensor in pair]
        return (*empty, *_flat(source))


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
            past_key_values=caches.cache_of_both(
                list(zip(past[::2], past[1::2])), list(zip(source[::2], source[1::2]))
            ),
            use_cache=True,
            return_dict=True,
        )
        grown, _ = caches.read_both(result.past_key_values)
        return (result.logits[:, -1].float(), *_flat(grown))
