"""transformers' caches, made of a loop's state and read into it; of any version.

Most layers keep keys and values, (batch, heads, length, head size), of all earlier positions: they grow by each step's.
Those with recurrent states (Mamba, gated delta rule) or short convolutions keep tensors of a fixed size in their place,
which each step replaces. A state has all that grow first, then the fixed ones.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    Tensors = Tuple[torch.Tensor, ...]
    # Each layer's keys and values, (batch, heads, length, head size).
    Pairs = List[Tuple[torch.Tensor, torch.Tensor]]

FIXED_STATES = (
    "fixed_states"  # in `Manifest.runtime`: how many of a decoder's last tensors do not grow; by default none
)


class LayerStates(NamedTuple):
    """What a layer keeps: keys and values if it `attends`; by their numbers, the last inputs of convolutions, (batch,
    channels, kernel size), and recurrent states, (batch, ...)."""

    attends: bool
    convolutions: Tuple[int, ...] = ()
    recurrent: Tuple[int, ...] = ()


class Past(NamedTuple):
    """What a decoder keeps of tokens: tensors that grow, and tensors of a fixed size, of its `layers`; no layers where all
    attend, and in the caches of transformers before version 5."""

    growing: Tensors
    fixed: Tensors = ()
    layers: Tuple[LayerStates, ...] = ()

    @property
    def tensors(self) -> Tensors:
        """All of them, as in a loop's state."""
        return (*self.growing, *self.fixed)


def cache_of(pairs: Pairs) -> object:
    """Return transformers' cache of these keys and values; before version 4.36 a tuple."""
    cache_utils = _cache_utils()
    if cache_utils is None:
        return tuple(pairs)
    cache = cache_utils.DynamicCache()
    for number, (keys, values) in enumerate(pairs):
        if not hasattr(cache_utils, "DynamicLayer"):  # before 4.54
            cache.update(keys, values, number)
            continue
        cache.layers.append(_filled(cache_utils.DynamicLayer(), keys, values))
    return cache


def read_cache(cache: Any) -> Pairs:
    """Return each layer's keys and values."""
    if isinstance(cache, tuple):
        return [(layer[0], layer[1]) for layer in cache]
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache))


def cache_of_both(past: Pairs, source: Pairs) -> object:
    """Return the cache of a decoder with an encoder: of its own keys and values, and of the source's."""
    try:
        from transformers.cache_utils import EncoderDecoderCache
    except ImportError:
        return tuple((*one, *two) for one, two in zip(past, source))
    return EncoderDecoderCache(cache_of(past), cache_of(source))


def read_both(cache: Any) -> Tuple[Pairs, Pairs]:
    """Return the keys and values of such a cache."""
    if isinstance(cache, tuple):
        return read_cache(cache), [(layer[2], layer[3]) for layer in cache]
    return read_cache(cache.self_attention_cache), read_cache(cache.cross_attention_cache)


def empty_cache() -> object:
    """Return a cache that keeps all positions; None, for a model's own, where that does too: before transformers 4.54.

    Later ones drop keys and values that the sliding windows of some layers (Gemma) no longer reach; steps mask them.
    """
    cache_utils = _cache_utils()
    if cache_utils is None or not hasattr(cache_utils, "DynamicLayer"):
        return None
    cache: object = cache_utils.DynamicCache()
    return cache


def own_cache(model: PreTrainedModel) -> Optional[Callable[[], Any]]:
    """Return what makes empty caches of a model with layers of a fixed size; None for all others, and where one of its
    layers keeps something else. Since transformers 5."""
    cache_utils = _cache_utils()
    if cache_utils is None or not hasattr(cache_utils, "LinearAttentionLayer"):
        return None
    try:
        cache = cache_utils.DynamicCache(config=model.config)
    except (AttributeError, KeyError, TypeError, ValueError):  # a configuration that does not name its layers
        return None
    names = [type(layer).__name__ for layer in cache.layers]
    if not any(name.startswith("LinearAttention") for name in names) or not set(names) <= set(_KEEPS_ALL):
        return None
    kinds = [getattr(cache_utils, _KEEPS_ALL[name]) for name in names]
    layers = [
        partial(_replacing(kind), number_of_states=layer.number_of_states)
        if hasattr(layer, "number_of_states")
        else kind
        for kind, layer in zip(kinds, cache.layers)
    ]
    return partial(_empty_cache_of, cache_utils.DynamicCache, layers)


def _empty_cache_of(kind: Callable[[], Any], layers: Sequence[Callable[[], Any]]) -> Any:
    cache = kind()
    cache.layers = [layer() for layer in layers]
    return cache


# From each kind of layer that is known to the one that keeps all positions, as steps need.
_KEEPS_ALL = {
    "DummyLayer": "DummyLayer",  # keeps nothing
    "DynamicLayer": "DynamicLayer",
    "DynamicSlidingWindowLayer": "DynamicLayer",
    "LinearAttentionLayer": "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer": "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer": "LinearAttentionAndFullAttentionLayer",
}


def fill_cache(cache: Any, past: Past) -> None:
    """Put a past into a model's `own_cache`."""
    growing, fixed = iter(past.growing), iter(past.fixed)
    for layer, kept in zip(cache.layers, past.layers):
        if kept.attends:
            _filled(layer, next(growing), next(growing))
        for number in kept.convolutions:
            tensor = next(fixed)
            layer.conv_states[number], layer.conv_kernel_size[number] = tensor, tensor.shape[-1]
            layer.is_conv_states_initialized[number] = layer.has_previous_state[number] = True
        for number in kept.recurrent:
            layer.recurrent_states[number] = next(fixed)
            layer.is_recurrent_states_initialized[number] = layer.has_previous_state[number] = True


def read_own_cache(cache: Any) -> Past:
    """Return what a model's `own_cache` holds."""
    layers = tuple(map(_kept, cache.layers))
    growing: List[torch.Tensor] = []
    fixed: List[torch.Tensor] = []
    for layer, kept in zip(cache.layers, layers):
        growing += [layer.keys, layer.values] if kept.attends else []
        fixed += [layer.conv_states[number] for number in kept.convolutions]
        fixed += [layer.recurrent_states[number] for number in kept.recurrent]
    return Past(tuple(growing), tuple(fixed), layers)


def _kept(layer: Any) -> LayerStates:
    return LayerStates(
        getattr(layer, "keys", None) is not None,
        tuple(_numbers(getattr(layer, "conv_states", {}))),
        tuple(_numbers(getattr(layer, "recurrent_states", {}))),
    )


def _numbers(states: Any) -> Iterator[int]:
    return (number for number, state in states.items() if state is not None)


def _filled(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
    """Return a layer with these; not by its `update`, which would put a concatenation of the whole cache into a graph."""
    layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
    layer.is_initialized = True
    return layer


@lru_cache(maxsize=None)
def _replacing(kind: Any) -> Any:
    """Return a kind of layer that replaces its states of a fixed size. transformers' own writes into the tensors that it
    was given, which are a graph's inputs."""

    class Replacing(kind):  # type: ignore[misc]
        def update_conv_state(
            self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: Optional[int] = None, **_: object
        ) -> torch.Tensor:
            import torch

            before, size = self.conv_states[state_idx], conv_kernel_size or conv_states.shape[-1]
            if before is None:
                before = conv_states.new_zeros((*conv_states.shape[:-1], size))
            else:
                size = before.shape[-1]
            whole = torch.cat([before, conv_states], dim=-1)
            self.conv_states[state_idx], self.conv_kernel_size[state_idx] = whole[..., -size:], size
            self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
            return whole

        def update_recurrent_state(
            self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: object
        ) -> torch.Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            self.is_recurrent_states_initialized[state_idx] = True
            return recurrent_states

    return Replacing


def _cache_utils() -> Optional[Any]:
    """Return transformers' module of caches; None before version 4.36."""
    try:
        from transformers import cache_utils
    except ImportError:
        return None
    untyped: Any = cache_utils
    return untyped
