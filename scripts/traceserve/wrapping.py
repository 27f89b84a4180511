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
        self.run = _by_last_end_token if type(model).__name__ in _READS_END_TOKENS else _by_itself

    def forward(self, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """`tensors` as `inputs`, int64 of shape (batch, length)."""
        result = self.run(self.model, dict(zip(self.inputs, tensors)))
        return tuple(result[name].float() for name in self.outputs)


def _by_itself(model: Any, columns: Dict[str, torch.Tensor]) -> Any:
    accepted = inspect.signature(model.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in accepted else {}
    return model(**columns, **fixed, return_dict=True)


# Classifiers that read the hidden state of each row's last end token, and find these all at once: in a batch whose rows
# differ in their number of end tokens that fails, or takes one row's for another's.
_READS_END_TOKENS = {
    f"{family}ForSequenceClassification"
    for family in ("Bart", "MBart", "PLBart", "Mvp", "BigBirdPegasus", "T5", "MT5", "UMT5")
}


def _by_last_end_token(model: Any, columns: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The same classification with each row's last end token found in that row alone."""
    ids = columns["input_ids"]
    if hasattr(model, "_shift_right"):  # T5 and its kin
        backbone, fixed = model.transformer, {"decoder_input_ids": model._shift_right(ids)}
    else:
        backbone, fixed = model.model, {}
    hidden = backbone(**columns, **fixed, use_cache=False, return_dict=True).last_hidden_state
    places = torch.arange(ids.shape[1], device=ids.device)
    last = (ids.eq(model.config.eos_token_id) * places).argmax(dim=1)
    rows = torch.arange(ids.shape[0], device=ids.device)
    return {"logits": model.classification_head(hidden[rows, last])}


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
    """Inputs to trace with, int64 of shape (batch, length): whole texts, special tokens included, and padding.

    Batch and length should be above 1, and the mask hold padding: a trace at 1, or without, has been seen to be wrong
    at other shapes. Every row has its special tokens, since some models (BART's classifier) look for them.
    """
    facts = original.tokenizer_facts
    padding = {"input_ids": facts.pad_id, "attention_mask": 0, "token_type_ids": facts.pad_type_id}
    columns = {name: torch.full((batch, length), padding[name]) for name in original.inputs}
    for row in range(batch):
        # All but one token of the first rows, and about half of the last one.
        tokens = max(1, length - 1 if row < batch - 1 else length // 2)
        encoded = original.tokenizer(
            "The quick brown fox jumps over the lazy dog. " * length, truncation=True, max_length=tokens
        )
        count = len(encoded["input_ids"])
        place = slice(0, count) if facts.padding_side == "right" else slice(length - count, length)
        values = {"token_type_ids": [0] * count, "attention_mask": [1] * count, **encoded}
        for name, column in columns.items():
            column[row, place] = torch.tensor(values[name])
    return tuple(columns[name] for name in original.inputs)
