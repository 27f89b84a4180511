"""Traces the explaining graphs: from token ids to word embeddings, and from these to the outputs.

The second reads the same inputs as the model, since some models take positions from token ids; a hook puts the given
embeddings into the place of its own. So it works for every model that looks its embeddings up once, whether its
`forward` takes `inputs_embeds` or not.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
from traceserve_runtime.errors import reason
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.runtimes.calling import Single
from traceserve_runtime.runtimes.torchscript.gradients import GRADIENTS_FILE, PLACES_FILE
from traceserve_runtime.runtimes.torchscript.weights import Place, read_places, write_places

from traceserve.building.checkpoints.original import Original
from traceserve.building.config.dtypes import DTYPES
from traceserve.building.writers.contract import NoGradients
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.tracing.graphs import TRACED_BATCH, TRACED_LENGTH, together, trace, write_module
from traceserve.building.writers.tracing.wrapping import example, traceable
from traceserve.errors import NoSpace

_EMBED, _OUTPUTS = "embed", "outputs"


class LookUp(torch.nn.Module):
    """Token ids to word embeddings, float32 of shape (batch, length, size)."""

    def __init__(self, embeddings: torch.nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look them up."""
        found: torch.Tensor = self.embeddings(ids)
        return found.float()


class FromEmbeddings(torch.nn.Module):
    """Word embeddings and the model's inputs to its outputs."""

    def __init__(self, call: Single, embeddings: torch.nn.Module) -> None:
        super().__init__()
        self.model = call.model
        self.call = call
        weight = getattr(embeddings, "weight", None)
        # An encoder and a decoder may have modules of their own for the same embeddings.
        alike = [part for part in call.model.modules() if part is embeddings or is_look_up(part, weight)]
        self._looking_up: Tuple[torch.nn.Module, ...] = tuple(alike)  # not a second time among the parts

    def forward(self, embeddings: torch.Tensor, *tensors: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Return the call's result for these embeddings; raises NoGradients if the model does not look them up once."""
        replaced: List[object] = []

        def replace(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
            replaced.append(None)
            return embeddings.to(output.dtype)

        hooks = [part.register_forward_hook(replace) for part in self._looking_up]
        try:
            outputs: Tuple[torch.Tensor, ...] = self.call(*tensors)
        finally:
            for hook in hooks:
                hook.remove()
        if len(replaced) != 1:
            name = type(self.model).__name__
            raise NoGradients(f"{name} looks its word embeddings up {len(replaced)} times, and gradients need one")
        return outputs


def is_look_up(part: torch.nn.Module, weight: object) -> bool:
    """Return whether a module looks up rows of this weight."""
    return isinstance(part, torch.nn.Embedding) and part.weight is weight


def word_embeddings(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model's word embeddings; raises NoGradients if it does not say which they are."""
    try:
        found: object = model.get_input_embeddings()  # type: ignore[operator]  # transformers models have it
    except (AttributeError, NotImplementedError, TypeError):
        found = None
    if not isinstance(found, torch.nn.Module):
        raise NoGradients(f"{type(model).__name__} does not say which module has its word embeddings")
    return found


def write_gradients(original: Original, manifest: Manifest, folder: Path) -> Tuple[str, ...]:
    """Write `folder/gradients.pt` and the positions of its weights in the model's file; see Writer."""
    if not DTYPES[manifest.dtype].differentiable:
        raise NoGradients(f"{manifest.dtype} has no gradients")
    if manifest.shapes.graph_per_shape:
        raise NoGradients("a model with one graph for each shape has none")
    model: Any = original.model
    embeddings = word_embeddings(model)
    try:
        with warnings.catch_warnings(), traceable(model), torch.no_grad(), precision.tracing(original.dtype):
            warnings.simplefilter("ignore")
            inputs = example(original, TRACED_BATCH, min(TRACED_LENGTH, original.max_length))
            ids = inputs[original.inputs.index("input_ids")]
            look_up = LookUp(embeddings).eval()
            call = Single(model, original.inputs, manifest.outputs)
            module = together(
                {
                    _EMBED: trace(look_up, (ids,)),
                    _OUTPUTS: trace(FromEmbeddings(call, embeddings).eval(), (look_up(ids), *inputs)),
                }
            )
            _write_without_weights(module, folder)
    except (NoGradients, NoSpace):
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        raise NoGradients(f"torch.jit.trace cannot trace it from its embeddings: {reason(error)}") from error
    return (GRADIENTS_FILE, PLACES_FILE)


def _write_without_weights(module: torch.nn.Module, folder: Path) -> None:
    """Write the graphs; each weight stays in the model's file, where the graph of the whole model has it by the same
    name."""
    known = read_places(folder)
    by_model = {name.partition("model.")[2]: place for name, place in known.items()}
    tensors = module.state_dict(keep_vars=True)
    found: Dict[Tuple[int, Tuple[int, ...]], Place] = {}  # a tensor with several names has one position
    for name, tensor in tensors.items():
        place = by_model.get(name.partition("model.")[2])
        if place is not None and place.shape == tuple(tensor.shape) and place.dtype == _dtype(tensor):
            found[_identity(tensor)] = place
    places = {name: found[_identity(tensor)] for name, tensor in tensors.items() if _identity(tensor) in found}
    with _emptied(module, places):
        write_module(module, folder / GRADIENTS_FILE)
    write_places(folder, places, PLACES_FILE)


@contextlib.contextmanager
def _emptied(module: torch.nn.Module, names: Dict[str, Place]) -> Iterator[None]:
    """Take these tensors' content away for a while: the original has it too."""
    tensors = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name in names}
    content = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = content[name]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).replace("torch.", "")


def _identity(tensor: torch.Tensor) -> Tuple[int, Tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)
