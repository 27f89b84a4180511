"""The operator `neuron::forward_1`, and modules that call it instead of the compiled operators."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import sys
from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch.library import Library

from neuron_double import cores

_library = Library("neuron", "DEF")
_library.define("forward_1(Tensor[] inputs, Tensor program, str signature) -> Tensor[]")

_loaded: Dict[str, torch.jit.ScriptModule] = {}  # by the program's digest
_compiling = [False]


class GraphModule(torch.nn.Module):
    """A graph whose operators are one program for the chip, except for `left` that stay on the CPU."""

    def __init__(self, program: torch.Tensor, signature: str, left: int, single: bool) -> None:
        super().__init__()
        self.register_buffer("program", program)
        self.signature, self.left, self.single = signature, left, single

    def forward(self, *argument: torch.Tensor) -> Any:
        outputs = list(torch.ops.neuron.forward_1(list(argument), self.program, self.signature))
        for _ in range(self.left):  # stands for operators unknown to the compiler
            outputs[0] = torch.mul(outputs[0], 1.0)
        return outputs[0] if self.single else tuple(outputs)


def compile_graph(traced: torch.jit.ScriptModule, inputs: Sequence[torch.Tensor], left: int = 0) -> torch.nn.Module:
    """Return the traced module with one operator instead of its own."""
    program, single = _program(traced), isinstance(traced(*inputs), torch.Tensor)
    digest = hashlib.sha256(program.numpy().tobytes()).hexdigest()
    shapes = [[list(tensor.shape), str(tensor.dtype)] for tensor in inputs]
    signature = json.dumps({"digest": digest, "inputs": shapes})
    _compiling[0] = True
    try:
        return torch.jit.trace(GraphModule(program, signature, left, single), tuple(inputs), check_trace=False)
    finally:
        _compiling[0] = False


def is_on_neuron(module: Any) -> bool:
    """Return whether a loaded module calls the operator."""
    return (
        "neuron::" in str(module.inlined_graph)
        if hasattr(module, "forward") and _has_graph(module)
        else any(is_on_neuron(child) for child in module.children())
    )


def _has_graph(module: Any) -> bool:
    try:
        return module.inlined_graph is not None
    except RuntimeError:  # it only contains others
        return False


def _program(traced: torch.jit.ScriptModule) -> torch.Tensor:
    """Return the module as bytes, with the chip's weights."""
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    if _noise() == "bfloat16":
        copy = torch.jit.load(io.BytesIO(buffer.getvalue()))
        for tensor in (*copy.parameters(), *copy.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.bfloat16).to(tensor.dtype)
        buffer = io.BytesIO()
        torch.jit.save(copy, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).clone()


def _noise() -> str:
    return os.environ.get("NEURON_DOUBLE_NOISE", "bfloat16")


def _forward(inputs: List[torch.Tensor], program: torch.Tensor, signature: str) -> List[torch.Tensor]:
    facts = json.loads(signature)
    if not _compiling[0]:
        cores.check()
        _check(inputs, facts["inputs"])
    outputs = _load(facts["digest"], program)(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return [_disturbed(output) for output in outputs]


def _check(inputs: List[torch.Tensor], expected: Sequence[Tuple[List[int], str]]) -> None:
    if len(inputs) != len(expected):
        _fail(f"Incorrect number of input tensors: received {len(inputs)}, expected {len(expected)}.")
    for number, (tensor, (shape, dtype)) in enumerate(zip(inputs, expected)):
        for what, got, wanted in (("shape", list(tensor.shape), shape), ("type", str(tensor.dtype), dtype)):
            if got != wanted:
                _fail(f"Incorrect tensor {what} at input tensor #{number}: received {got}, expected {wanted}.")


def _fail(message: str) -> None:
    print(f"ERROR  {message}", file=sys.stderr, flush=True)  # torch 1.13 loses an operator's error message
    raise RuntimeError(message)


def _load(digest: str, program: torch.Tensor) -> torch.jit.ScriptModule:
    if digest not in _loaded:
        _loaded[digest] = _original_load(io.BytesIO(program.numpy().tobytes()))
    return _loaded[digest]


def _disturbed(output: torch.Tensor) -> torch.Tensor:
    noise = _noise()
    if noise in ("bfloat16", "none") or not output.is_floating_point():
        return output.clone()
    generator = torch.Generator().manual_seed(0)
    signs = torch.rand(output.shape, generator=generator) * 2 - 1
    return output + float(noise) * output.abs().max().clamp(min=1.0) * signs


_original_load = torch.jit.load


@functools.wraps(_original_load)
def _wrapped_load(*arguments: Any, **options: Any) -> Any:
    """Like the real packages' `torch.jit.load`, start the runtime for a module for the chip."""
    module = _original_load(*arguments, **options)
    if is_on_neuron(module):
        cores.initialize()
    return module


def register() -> None:
    """Do what importing either package does; once."""
    if torch.jit.load is not _wrapped_load:
        _library.impl("forward_1", _forward, "CPU")
        torch.jit.load = _wrapped_load
