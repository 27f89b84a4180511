"""torch's private names that a worker uses, each behind a function that says why, since when, and what happens without it.

None of them is promised to stay. They are known from torch 1.13, which AWS's Inf1 has, to 2.13, unless a function says
otherwise. No other file of the serving side reaches into private names of torch; a test takes each of them away, and asks an
archive again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, List, Sequence

from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.runtimes import graph as graphs

if TYPE_CHECKING:
    import torch

    from traceserve_runtime.runtimes.graph import Graph, Traced, ValueType

PRODUCT = "mkldnn::_linear_pointwise"  # rows and a weight that was packed; since torch 2.0
GRAPH_CLASSES = (graphs.Graph, graphs.Block, graphs.Node, graphs.Value, graphs.Use)


# Rewriting of graphs


def rewrites() -> bool:
    """Whether this torch has all that is called while a graph is rewritten; to be asked before the first change.

    Where it has not, a graph is run as it was saved: with the same answers, for more work.
    """
    import torch

    passes = ("_jit_pass_inline", "_jit_pass_cse", "parse_ir")
    return not missing_members() and all(hasattr(torch._C, name) for name in passes)


def missing_members() -> List[str]:
    """The members of torch's graphs that `runtimes.graph` lists and this torch has not."""
    import torch

    found = []
    for needed in GRAPH_CLASSES:
        own = getattr(torch._C, needed.__name__, None)
        found += [f"{needed.__name__}.{name}" for name in named_members(needed) if not hasattr(own, name)]
    return found


def named_members(needed: type) -> List[str]:
    """What a type of `runtimes.graph` lists: methods, and attributes by their annotations."""
    names = {*dir(needed), *getattr(needed, "__annotations__", {})}
    return sorted(name for name in names if not name.startswith("_"))


def inline(graph: Graph) -> bool:
    """Put the methods and functions that a graph calls in the place of the calls, as torch does before it runs a graph.

    torch's own property `inlined_graph` gives a copy, which nobody runs. Returns False where the name is gone.
    """
    import torch

    if not hasattr(torch._C, "_jit_pass_inline"):
        return False
    torch._C._jit_pass_inline(graph)
    return True


def merge_equal(graph: Graph) -> None:
    """Compute once what a graph computes several times. Asked for by `rewrites`."""
    import torch

    torch._C._jit_pass_cse(graph)


def parse(text: str) -> Graph:
    """The graph that a text describes, in the form that torch prints. Asked for by `rewrites`."""
    import torch

    parsed: Graph = torch._C.parse_ir(text)  # type: ignore[assignment]  # torch's own types lack members
    return parsed


def type_named(name: str) -> ValueType:
    """The type of this name in a graph's text, as "Tensor[]"; the classes of types have more names that could go."""
    return next(parse(f"graph(%value : {name}):\n  return (%value)").inputs()).type()


# Packed weights


def packable() -> List[torch.dtype]:
    """The dtypes in which a product reads a weight that was packed before: since torch 2.0, none without oneDNN.

    The operators are written for torch's own compiler, and what they take has changed with it. So one number is packed and
    multiplied, where a graph would only fail when it is run. Without them weights stay as they are: each product packs its own.
    """
    import torch

    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch._C.ScriptModule, "_register_attribute") or not rewrites():
        return []
    number = torch.ones(1, 1)
    try:
        product = torch.ops.mkldnn._linear_pointwise(number, reorder(number, 1), number[0], "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return []
    if product.tolist() != [[2.0]]:
        return []
    try:
        of_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError, TypeError):
        of_bfloat16 = False
    return [torch.float32, *([torch.bfloat16] if of_bfloat16 else [])]


def reorder(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A weight, (outputs, inputs), in the order in which oneDNN reads it for about so many rows. Asked for by `packable`."""
    import torch

    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def register(module: Traced, name: str, tensor: torch.Tensor) -> None:
    """Give a module that was read from a file one more tensor. Asked for by `packable`.

    What torch offers itself refuses a new name, and a graph cannot hold a packed tensor as a constant.
    """
    script: Any = module
    script._c._register_attribute(name, type_named("Tensor"), tensor)


# Running


def set_profiling(wanted: bool) -> bool:
    """Let TorchScript record shapes for two runs and then specialise the graph for them, or not; gives what it did before.

    Where the name is gone it goes on as it does by default: with the same answers, the first ones later.
    """
    import torch

    if not hasattr(torch._C, "_jit_set_profiling_mode"):
        return wanted
    before: bool = torch._C._jit_set_profiling_mode(wanted)
    return before


def settle_compiler(shapes: int) -> None:
    """Let torch.compile (since 2.0) work in this process, for so many shapes, and raise what it fails with.

    Where one of its settings is gone, what torch does by default is done: with the same answers, more processes, or without
    compiling from the ninth shape on.
    """
    try:
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor
    except ImportError:
        return
    wanted = (
        (inductor, "compile_threads", 1),  # others are processes that import torch, and stay
        (dynamo, "recompile_limit", shapes),
        (dynamo, "cache_size_limit", shapes),  # its name before torch 2.6
        (dynamo, "fail_on_recompile_limit_hit", True),
        (dynamo, "suppress_errors", False),
    )
    for config, name, value in wanted:
        if hasattr(config, name):
            setattr(config, name, value)


def load_compiled(file: str) -> Callable[..., Sequence[torch.Tensor]]:
    """The model of a package of machine code, by AOTInductor; raises MissingPackage, since nothing else can run it.

    torch's documentation names this function, from 2.6 on; a package runs under the torch that made it alone.
    """
    import torch

    inductor: Any = getattr(torch, "_inductor", None)
    if not hasattr(inductor, "aoti_load_package"):
        raise MissingPackage(
            f"this archive was compiled by AOTInductor, and torch {torch.__version__} cannot load it: it lacks "
            "torch._inductor.aoti_load_package; build the archive with another save mode"
        )
    model: Callable[..., Sequence[torch.Tensor]] = torch._inductor.aoti_load_package(file)
    return model
