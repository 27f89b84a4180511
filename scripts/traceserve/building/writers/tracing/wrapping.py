"""Turns a model into the module to trace: fixed positional inputs, tensors out."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from types import ModuleType
from typing import Any, Callable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from traceserve_runtime.errors import reason
from traceserve_runtime.runtimes.calling import Single

from traceserve.building.checkpoints.original import Original
from traceserve.building.writers.tracing.replacing import replaced, replaced_here
from traceserve.errors import ExportError, NoSpace, UnwritableError

Result = Union[torch.Tensor, Tuple[torch.Tensor, ...]]

# What the tracer, and models that cannot be traced, raise.
TRACING_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)
_REMOTE = "transformers_modules"  # transformers' package for checkpoints' own code
_OURS = "traceserve.building"
# A trace contains the class names of its modules. Ours keep these names even if their files move, so that the same
# checkpoint gives the same graph.
_NAMED = {
    f"{_OURS}.writers.tracing.wrapping": "traceserve.wrapping",
    f"{_OURS}.writers.tracing.fixed_shapes": "traceserve.fixed_shapes",
    f"{_OURS}.writers.lowering.int8": "traceserve.quantization",
    f"{_OURS}.checkpoints.libraries.curated_models": "traceserve.libraries.curated_models",
}


class Wrapped(torch.nn.Module):
    """A call of a model (`runtimes.calling`) as a module, with the model's weights as its own."""

    def __init__(self, call: Callable[..., Result]) -> None:
        super().__init__()
        self.model = getattr(call, "model", None)  # an empty cache needs none
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> Result:
        """Return the call's result."""
        outputs: Result = self.call(*tensors)
        return outputs


def once(original: Original, outputs: Sequence[str]) -> Wrapped:
    """Return the module of a model that runs once, from `original.inputs` to `outputs`."""
    return Wrapped(Single(original.model, original.inputs, outputs))


@contextlib.contextmanager
def as_traced(model: torch.nn.Module) -> Iterator[None]:
    """Let a model be traced: changed where it has to be, without gradients, and without the tracer's warnings, since the gate
    checks their suspicions."""
    with warnings.catch_warnings(), traceable(model), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


_PLACE_IN_GRAPH = "[Caused by the value"  # in errors of torch.onnx.export: half a kilobyte of the graph follows


@contextlib.contextmanager
def tracing_of(original: Original, act: str = "torch.jit.trace cannot trace") -> Iterator[None]:
    """Let the original be traced; raises UnwritableError with its own reason if it cannot be, which begins with `act`."""
    try:
        with as_traced(original.model):
            yield
    except (ExportError, NoSpace):
        raise
    except TRACING_ERRORS as error:
        said = reason(error).partition(_PLACE_IN_GRAPH)[0].rstrip()
        raise UnwritableError(f"{act} {type(original.model).__name__}: {said}") from error


@contextlib.contextmanager
def masks_without_vmap() -> Iterator[None]:
    """Make transformers build attention masks by broadcasting, like version 5.

    transformers 4.53 to 4.57 build a decoder's masks with torch.vmap, which torch.jit.trace cannot handle
    ("unordered_map::at"). The private name of its implementation, `_vmap_for_bhqkv`, is gone in version 5, which needs none
    of this. It can go with the support of 4.57.
    """
    try:
        from transformers import masking_utils as untyped
    except ImportError:  # before 4.53
        yield
        return
    masking_utils: object = untyped
    if not hasattr(masking_utils, "_vmap_for_bhqkv"):  # version 5
        yield
        return

    def broadcast(mask_function: Callable[..., torch.Tensor], bh_indices: bool = True) -> Callable[..., torch.Tensor]:
        def expanded(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            if not bh_indices:
                return mask_function(b, h, q[:, None], kv[None, :]).expand(q.shape[0], kv.shape[0])
            mask = mask_function(b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], kv)
            return mask.expand(b.shape[0], h.shape[0], q.shape[0], kv.shape[0])

        return expanded

    # Together with its preparation of indexing for vmap, which cannot be traced either.
    ours = {"_vmap_for_bhqkv": broadcast, "TransformGetItemToIndex": contextlib.nullcontext}
    with replaced(masking_utils, **{name: value for name, value in ours.items() if hasattr(masking_utils, name)}):
        yield


@contextlib.contextmanager
def forward_alone() -> Iterator[None]:
    """Run a model's own autograd functions (BLOOM's GELU, YOSO's attention) as the plain operations of their forward
    pass.

    torch.jit.trace records each as a Python call, which cannot be saved.
    """
    kind: Any = torch.autograd.Function

    def apply(cls: Any, *inputs: Any, **named: Any) -> Any:
        # A function with its own context, possible since torch 2.0, takes none in its forward pass.
        if getattr(cls, "setup_context", None) is not getattr(kind, "setup_context", None):
            return cls.forward(*inputs, **named)
        return cls.forward(_Context(), *inputs, **named)

    with replaced_here(kind, apply=classmethod(apply)):
        yield


class _Context(torch.autograd.function.FunctionCtx):
    """Holds what a forward pass keeps for a backward pass that never comes."""

    needs_input_grad: Tuple[bool, ...] = ()


@contextlib.contextmanager
def windows_by_unfold() -> Iterator[None]:
    """Make Longformer and LED cut overlapping windows with `unfold`: a trace fixes strides, which depend on the
    length."""
    own = torch.Tensor.as_strided

    def cut(tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], *more: int) -> torch.Tensor:
        whole = tensor.flatten(1, 2) if tensor.ndim == 4 else tensor  # in windows that do not overlap
        along = len(size) == 4 and whole.ndim == 3 and not more
        if not along or (stride[0], *stride[2:]) != whole.stride() or int(size[3]) != whole.shape[2]:
            return own(tensor, size, stride, *more)
        return whole.unfold(1, int(size[2]), int(stride[1]) // int(stride[2])).transpose(2, 3)

    with replaced_here(torch.Tensor, as_strided=cut):
        yield


@contextlib.contextmanager
def truths_as_numbers() -> Iterator[None]:
    """Make sparse attention (DeepSeek V3.2's) scatter 0 and 1: torch records a scattered bool as no operator of its own."""
    own = torch.Tensor.scatter

    def scatter(tensor: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        if given and isinstance(given[-1], bool):
            given = (*given[:-1], int(given[-1]))
        if isinstance(named.get("value"), bool):
            named["value"] = int(named["value"])
        return own(tensor, *given, **named)

    with replaced_here(torch.Tensor, scatter=scatter):
        yield


@contextlib.contextmanager
def traceable(model: torch.nn.Module) -> Iterator[None]:
    """Prepare a model for torch's tracer, so that it can be saved."""
    with masks_without_vmap(), forward_alone(), windows_by_unfold(), truths_as_numbers(), positions_by_length(
        model
    ), all_experts(model), plain_names(model):
        yield


@contextlib.contextmanager
def all_experts(model: Any) -> Iterator[None]:
    """Make a model compute its experts by products of groups, where it has them and loops over those that its tokens hit
    (OpenAI's privacy filter, for its roundings): a trace keeps those of the example."""
    own = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else {}  # transformers 5
    if "eager" not in own.values():
        yield
        return
    with contextlib.suppress(ValueError):  # it has no experts, or no other way
        model.set_experts_implementation("grouped_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(own)


@contextlib.contextmanager
def positions_by_length(model: torch.nn.Module) -> Iterator[None]:
    """Make Funnel compute its relative positions from the length: transformers lists them in Python, which a trace
    fixes.

    A list is an arithmetic series: block b's positions begin at 1 - 2**b if the first token is separate, else at 0, and
    are 2**b apart. So its first member, its length and its step suffice, and are known for any length.
    """
    kinds = {type(part) for part in model.modules() if type(part).__name__ == "FunnelAttentionStructure"}
    own = {kind: kind.get_position_embeds for kind in kinds}  # type: ignore[attr-defined]

    def encodings(structure: Any, length: int, dtype: torch.dtype, device: torch.device) -> object:
        config = structure.config
        if config.attention_type == "factorized":  # it lists nothing
            return own[type(structure)](structure, length, dtype, device)
        half = config.d_model // 2
        frequencies = 1 / (10000 ** (torch.arange(0, half, dtype=torch.int64, device=device).to(dtype) / half))

        def encoded(greatest: int, least: int, stride: int) -> torch.Tensor:
            distances = torch.arange(greatest, least - 1, -stride, dtype=torch.int64, device=device).to(dtype)
            angles = distances[:, None] * frequencies[None]
            return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)

        made: List[List[Optional[torch.Tensor]]] = []
        first, count = 0, length
        for block in range(config.num_blocks):
            stride, pooling = 2**block, None
            if block:
                last = first + (count - 1) * (stride // 2)
                before = first
                if config.separate_cls:
                    first, count = 1 - stride, 1 + (count - int(config.truncate_seq)) // 2
                else:
                    count = (count + 1) // 2
                pooling = encoded(first - before + count * stride, first - last, stride // 2)
            made.append([encoded(count * stride, (1 - count) * stride, stride), pooling])
        return made

    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(replaced(kind, get_position_embeds=encodings))
        yield


@contextlib.contextmanager
def plain_names(model: torch.nn.Module) -> Iterator[None]:
    """Name the classes of a checkpoint's own code only after its files in a trace.

    transformers puts a checkpoint's code into a package named after the folder, and from version 5 on a hash of the
    code. torch writes a class's module into the file, and cannot read one with a component that begins with a digit. So
    the package is left out. Our own classes are named by `_NAMED`.
    """
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    own = {kind: kind.__module__ for kind in classes if kind.__module__.split(".")[0] == _REMOTE}
    named = {
        module: f"{_REMOTE}.code_{re.sub('[^A-Za-z0-9_]', '_', module.rpartition('.')[2])}" for module in own.values()
    }
    for module in _NAMED:
        kinds = vars(sys.modules[module]).values() if module in sys.modules else ()
        own.update({kind: module for kind in kinds if isinstance(kind, type) and kind.__module__ == module})
    named.update(_NAMED)
    # For lookups of a class's module, such as inspect's.
    added = {named[module]: sys.modules[module] for module in own.values() if named[module] not in sys.modules}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_also_found(added))
        for kind, module in own.items():
            stack.enter_context(replaced(kind, __module__=named[module]))
        yield


@contextlib.contextmanager
def _also_found(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def example(original: Original, batch: int, length: int) -> Tuple[torch.Tensor, ...]:
    """Return tracing inputs, int64 of shape (batch, length): whole texts, including special tokens, and padding. They
    are longer if the model cannot read such short ones.

    Batch and length should be above 1, and the mask contain padding: traces at 1, or without padding, were found to be
    wrong at other shapes. Every row has its special tokens, since some models (BART's classifier) search for them.
    """
    length = max(length, original.shortest)
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
        positions = slice(0, count) if facts.padding_side == "right" else slice(length - count, length)
        values = {"token_type_ids": [0] * count, "attention_mask": [1] * count, **encoded}
        for name, column in columns.items():
            column[row, positions] = torch.tensor(values[name])
    return tuple(columns[name] for name in original.inputs)
