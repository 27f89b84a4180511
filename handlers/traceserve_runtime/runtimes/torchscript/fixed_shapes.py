"""An encoder and a decoder of fixed shapes: every step rereads the whole text so far, padded.

Compiled shapes have no room for a growing cache. So the decoder keeps nothing: it reads its tokens from the first
one, padded to one of a few target lengths, and returns the logits at the wanted position. Later positions do
not matter, since no position sees them.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TYPE_CHECKING, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from traceserve_runtime.batching.batches import filled
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runner import Arrays, Padding, State
from traceserve_runtime.runtimes.modes import inference

if TYPE_CHECKING:
    import torch

    from traceserve_runtime.runtimes.graph import Traced


def encoder_name(manifest_shape: str) -> str:
    """Return the name of the graph that reads sources of a shape, from Shapes.graph_name."""
    return f"encoder_{manifest_shape}"


def decoder_name(manifest_shape: str, target: int) -> str:
    """Return the name of the graph that reads `target` tokens after sources of a shape."""
    return f"decoder_{manifest_shape}_target_{target}"


class PaddedRunner:
    """Graphs for each shape; see Runner. The state: the encoder's output, and the tokens so far."""

    padding = Padding()

    def __init__(self, module: Traced, manifest: Manifest, targets: Sequence[int]) -> None:
        self._module = module
        self._manifest = manifest
        self._targets = tuple(targets)

    def __call__(self, inputs: Arrays) -> Arrays:
        raise RuntimeError("this model is run in a loop")

    def start(self, inputs: Arrays) -> State:
        import torch

        ids, mask = (torch.from_numpy(inputs[name]) for name in self._manifest.inputs)
        [hidden] = self._run(encoder_name(self._shape(*ids.shape)), ids, mask)
        return (hidden, torch.empty(len(ids), 0, dtype=torch.int64))

    def step(self, inputs: Arrays, state: State, rows: Optional[np.ndarray] = None) -> Tuple[Arrays, State]:
        import torch

        hidden, written = state if rows is None else (tensor[torch.from_numpy(rows)] for tensor in state)
        new, mask = (torch.from_numpy(inputs[name]) for name in self._manifest.step_inputs)
        written = torch.cat([written, new], dim=1)
        count = written.shape[1]
        target = min(length for length in self._targets if length >= count)
        tokens = torch.full((len(written), target), self._manifest.tokenizer.pad_id, dtype=torch.int64)
        tokens[:, :count] = written
        position = torch.tensor([count - 1])
        logits = [
            self._run(decoder_name(self._shape(*of_mask.shape), target), of_hidden, of_mask, of_tokens, position)[0][
                :some
            ]
            for some, (of_hidden, of_mask, of_tokens) in self._portions(hidden, mask, tokens)
        ]
        return {self._manifest.outputs[0]: torch.cat(logits).numpy()}, (hidden, written)

    def join(self, states: Sequence[State], length: int) -> State:
        raise NotImplementedError("only a decoder's rows are joined")

    def open_lanes(self) -> Sequence[Executor]:
        return []

    def share_cores(self) -> None:
        pass  # a chip's, not the processor's

    def warm(self) -> None:
        """Run every graph once: its first run loads it into the chip."""
        shapes = self._manifest.shapes
        for batch in shapes.batches or ():
            for length in shapes.lengths or ():
                inputs = filled(self._manifest, batch, length)
                state = self.start(inputs)
                for target in self._targets:
                    new = np.zeros((batch, target), dtype=np.int64)
                    self.step({"decoder_input_ids": new, "attention_mask": inputs["attention_mask"]}, state)

    def _shape(self, batch: int, length: int) -> str:
        return self._manifest.shapes.graph_name(batch, length)

    def _portions(self, *tensors: torch.Tensor) -> Iterator[Tuple[int, Sequence[torch.Tensor]]]:
        """Yield the rows in compiled portions, filled by repeating the last row, with the number of real ones."""
        shapes = self._manifest.shapes
        most = max(shapes.batches or (len(tensors[0]),))
        for start in range(0, len(tensors[0]), most):
            portion = [tensor[start : start + most] for tensor in tensors]
            some = len(portion[0])
            missing = shapes.batch(some) - some
            yield some, [_filled_up(tensor, missing) for tensor in portion]

    def _run(self, name: str, *tensors: torch.Tensor) -> List[torch.Tensor]:
        with inference():
            outputs: List[torch.Tensor] = getattr(self._module, name)(*tensors)
        return outputs


def _filled_up(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    import torch

    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]) if missing else tensor.contiguous()
