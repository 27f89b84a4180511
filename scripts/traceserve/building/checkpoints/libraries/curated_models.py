"""Curated models with transformers' interface for tracing and the gate: its keywords in, its outputs out.

A curated model takes an `AttentionMask` instead of a tensor, and keeps keys and values in its own objects.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Optional

import torch
from curated_transformers.layers import AttentionMask, KeyValueCache
from curated_transformers.layers.embeddings import QueryKeyRotaryEmbeddings
from traceserve_runtime.runtimes.caches import read_cache
from transformers import GenerationMixin as untyped_mixin
from transformers import PreTrainedModel as untyped_model
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PreTrainedModel: Any = untyped_model
_GenerationMixin: Any = untyped_mixin


class _Curated(_PreTrainedModel):  # type: ignore[misc]
    """A curated model that replaces transformers' `original` of the same checkpoint."""

    base_model_prefix = "model"
    _supports_sdpa = True  # the configuration may request it; the curated model has its own attention

    def __init__(self, model: Any, original: PreTrainedModel) -> None:
        super().__init__(copy.deepcopy(original.config))
        self.model = model


class Encoder(_Curated):
    """A curated encoder."""

    def __init__(self, model: Any, original: PreTrainedModel) -> None:
        super().__init__(model, original)
        embeddings = model.embeddings
        if hasattr(embeddings, "padding_id"):
            # Like transformers, marks that positions count from this id. It only affects gradients.
            embeddings.position_embeddings.padding_idx = embeddings.padding_id

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: Optional[torch.Tensor] = None,
        return_dict: bool = True,
    ) -> object:
        """All int64 of shape (batch, length)."""
        result = self.model(input_ids, AttentionMask(attention_mask.bool()), type_ids=token_type_ids)
        return BaseModelOutput(last_hidden_state=result.last_hidden_layer_state)


class CausalLM(_Curated, _GenerationMixin):  # type: ignore[misc]
    """A curated causal language model. `generate` reruns the whole sequence for each token: the reference for the
    cache."""

    def __init__(self, model: Any, original: PreTrainedModel, longest: int) -> None:
        """`longest`: the most tokens that a row will have."""
        super().__init__(model, original)
        self.generation_config = original.generation_config
        self.generation_config.use_cache = False
        _tie(model, original)
        _share_tables(model, longest)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: Optional[torch.Tensor] = None, **unused: object
    ) -> object:
        """Return the arguments that `generate` passes to `forward`."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        past_key_values: object = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> object:
        """Tokens and positions (batch, new), mask (batch, past + new); returns the last `logits_to_keep` tokens'
        logits, or all."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if position_ids is None:
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        pairs = [] if past_key_values is None else read_cache(past_key_values)
        past = [KeyValueCache(*pair) for pair in pairs] or None  # the library takes no empty cache
        result = self.model.decoder(
            input_ids,
            AttentionMask(mask.bool()),
            cache=past,
            positions=position_ids.contiguous(),  # the library views them as one row
            store_cache=use_cache,
        )
        hidden = result.last_hidden_layer_state
        grown: Any = tuple((layer.key, layer.value) for layer in result.cache) if use_cache else None
        return CausalLMOutputWithPast(logits=self._logits(hidden[:, -logits_to_keep:]), past_key_values=grown)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = getattr(self.model, "output_embeddings", None)
        if head is None:  # MPT uses its embeddings, by the library's design
            return torch.nn.functional.linear(hidden, self.model.decoder.embeddings.piece_embeddings.weight)
        logits: torch.Tensor = head(hidden)
        return logits


def _tie(model: Any, original: PreTrainedModel) -> None:
    """Tie weights that transformers ties; the library always has two."""
    tied = original.get_output_embeddings().weight is original.get_input_embeddings().weight
    if tied and hasattr(model, "output_embeddings"):
        model.output_embeddings.weight = model.decoder.embeddings.piece_embeddings.weight


def _share_tables(model: Any, longest: int) -> None:
    """Share one table of rotary embeddings among all layers, long enough for every row.

    The library grows each layer's as needed, which a trace cannot: it keeps the table that it saw.
    """
    shared: Any = None
    for module in model.modules():
        if isinstance(module, QueryKeyRotaryEmbeddings):
            if shared is None:
                shared = module.rotary_embeds
                shared(torch.zeros(1, 1, longest, module.rotary_width))  # makes the table this long
            module.rotary_embeds = shared
