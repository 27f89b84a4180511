"""A model to the module that is traced: fixed positional inputs, tensors out."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple

import torch

from traceserve.loading import Original


class Wrapped(torch.nn.Module):
    """Calls the model by keyword, without a cache, and gives a tuple of float32 tensors in the order of `outputs`.

    transformers 5 has no torchscript flag. Positional calls depend on each model's order of arguments, and
    `config.return_dict=False` breaks GPT-2, Llama and ModernBERT.
    """

    def __init__(self, model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        accepted = inspect.signature(model.forward).parameters
        self.fixed = {"use_cache": False} if "use_cache" in accepted else {}

    def forward(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """`tensors` as `inputs`, int64 of shape (batch, length)."""
        result = self.model(**dict(zip(self.inputs, tensors)), **self.fixed, return_dict=True)
        return tuple(result[name].float() for name in self.outputs)


@contextlib.contextmanager
def masks_without_vmap() -> Iterator[None]:
    """Let transformers build attention masks by broadcasting, as its version 5 does.

    transformers 4.53 to 4.57 build a decoder's masks with torch.vmap, where torch.jit.trace fails ("unordered_map::at").
    This can go with the support of 4.57.
    """
    try:
        from transformers import masking_utils as untyped
    except ImportError:  # before 4.53
        yield
        return
    masking_utils: Any = untyped
    if not hasattr(masking_utils, "_vmap_for_bhqkv"):  # version 5
        yield
        return

    def broadcast(mask_function: Callable[..., torch.Tensor], bh_indices: bool = True) -> Callable[..., torch.Tensor]:
        def expanded(b: Any, h: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            if not bh_indices:
                return mask_function(b, h, q[:, None], kv[None, :]).expand(q.shape[0], kv.shape[0])
            mask = mask_function(b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], kv)
            return mask.expand(b.shape[0], h.shape[0], q.shape[0], kv.shape[0])

        return expanded

    # With it goes what makes indexing fit for vmap, which cannot be traced either.
    replaced = {"_vmap_for_bhqkv": broadcast, "TransformGetItemToIndex": contextlib.nullcontext}
    own = {name: getattr(masking_utils, name) for name in replaced if hasattr(masking_utils, name)}
    for name in own:
        setattr(masking_utils, name, replaced[name])
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(masking_utils, name, value)


def example(original: Original, batch: int, length: int) -> Tuple[torch.Tensor, ...]:
    """Inputs to trace with, int64 of shape (batch, length): ordinary tokens, and padding at the end of one row.

    Batch and length should be above 1, and the mask hold padding: a trace at 1, or without, has been seen to be wrong
    at other shapes.
    """
    facts = original.tokenizer_facts
    tokenizer = original.tokenizer.backend_tokenizer
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * length).ids[: length - 1] + [facts.pad_id]
    columns: Dict[str, torch.Tensor] = {
        "input_ids": torch.tensor([ids] * batch),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        "token_type_ids": torch.zeros(batch, length, dtype=torch.int64),
    }
    columns["input_ids"][-1, length // 2 :] = facts.pad_id
    columns["attention_mask"][:, -1] = 0
    columns["attention_mask"][-1, length // 2 :] = 0
    if facts.padding_side == "left":
        columns = {name: tensor.flip(1) for name, tensor in columns.items()}
    return tuple(columns[name] for name in original.inputs)
