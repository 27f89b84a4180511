"""Text to text in fixed shapes: an encoder, and a decoder that rereads all its tokens, padded, at every step.

The graphs of `loops` pass a growing cache from step to step; compiled shapes have no room for one. These
compute more, and need no state on the device (`traceserve_runtime.runtimes.torchscript.fixed_shapes` runs them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Dict, Iterator, NamedTuple, Sequence, Tuple

import torch
from traceserve_runtime.manifest import Shapes
from traceserve_runtime.runtimes.torchscript.fixed_shapes import decoder_name, encoder_name

from traceserve.building.checkpoints.original import Original
from traceserve.building.writers.tracing.wrapping import example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP_INPUTS = ("decoder_input_ids", "attention_mask")
SHORT_TARGET = 32  # tokens; a graph of this length writes the first ones


class FixedGraph(NamedTuple):
    """A module to trace, and an example of its inputs: the only shapes that it will get."""

    module: torch.nn.Module
    example: Tuple[torch.Tensor, ...]


def targets(most: int) -> Tuple[int, ...]:
    """Return the decoder's input lengths, for texts of up to `most` new tokens."""
    return (SHORT_TARGET, most) if most > SHORT_TARGET else (most,)


def fixed_graphs(original: Original, shapes: Shapes, lengths: Sequence[int]) -> Dict[str, FixedGraph]:
    """The encoder for each shape, and the decoder for each shape and target length."""
    return dict(_graphs(original, shapes, lengths))


def _graphs(original: Original, shapes: Shapes, lengths: Sequence[int]) -> Iterator[Tuple[str, FixedGraph]]:
    encoder, decoder = _Encoder(original.model), _Decoder(original.model)
    for batch in shapes.batches or ():
        for length in shapes.lengths or ():
            shape = shapes.graph_name(batch, length)
            columns = dict(zip(original.inputs, example(original, batch, length)))
            ids, mask = columns["input_ids"], columns["attention_mask"]
            yield encoder_name(shape), FixedGraph(encoder, (ids, mask))
            with torch.no_grad():
                hidden = encoder(ids, mask)[0]
            for target in lengths:
                tokens = torch.full((batch, target), original.tokenizer_facts.pad_id)
                tokens[:, 0] = original.facts["start_id"]
                some = min(length, target) // 2
                tokens[:, 1 : 1 + some] = ids[:, :some]
                yield decoder_name(shape, target), FixedGraph(decoder, (hidden, mask, tokens, torch.tensor([some])))


class _Encoder(torch.nn.Module):
    """Maps the source, ids and mask int64 (batch, length), to its hidden states, float32 (batch, length, size)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        result = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return (result.last_hidden_state,)


class _Decoder(torch.nn.Module):
    """Maps hidden states, the source's mask, tokens int64 (batch, target) and a position int64 (1) to the logits after
    the token at that position, (batch, vocabulary).

    The position is selected before the model's head, the most expensive layer with large vocabularies, by a product
    and a sum, which any compiler supports. The model itself does the rest, including T5's scaling before its head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor, tokens: torch.Tensor, position: torch.Tensor
    ) -> Tuple[torch.Tensor, ...]:
        wanted = (torch.arange(tokens.shape[1]) == position)[None, :, None]

        def select(head: torch.nn.Module, inputs: Tuple[torch.Tensor, ...]) -> torch.Tensor:
            return (inputs[0] * wanted.to(inputs[0].dtype)).sum(dim=1, keepdim=True)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(select)
        try:
            result = self.model(
                encoder_outputs=(hidden,),
                attention_mask=attention_mask,
                decoder_input_ids=tokens,
                use_cache=False,
                return_dict=True,
            )
        finally:
            hook.remove()
        return (result.logits[:, 0].float(),)
