"""torch's private names that a worker uses, each behind a function that says why, since when, and what happens without
it.

They may change at any time. They are known from torch 1.13, Inf1's, to 2.13, unless a function says
otherwise. No other file of the serving side uses private names of torch; a test removes each of them, and queries an
archive again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from typing import TYPE_CHECKING, Any, Callable, Iterator, List, Optional, Sequence

from traceserve_runtime.errors import MissingPackage
from traceserve_runtime.runtimes import graph as graphs

if TYPE_CHECKING:
    import torch

    from traceserve_runtime.runtimes.graph import Graph, Traced, ValueType

PRODUCT = "mkldnn::_linear_pointwise"  # rows and a packed weight; since torch 2.0
# Rows in float32, and a weight packed in float16 with its bias, of the type HALF; since torch 1.4.
HALF_PRODUCT = "quantized::linear_dynamic_fp16"
HALF = "__torch__.torch.classes.quantized.LinearPackedParamsBase"
_ONE_LOADS = threading.Lock()
GRAPH_CLASSES = (graphs.Graph, graphs.Block, graphs.Node, graphs.Value, graphs.Use)


# Rewriting of graphs


def rewrites() -> bool:
    """Return whether this torch has everything needed for rewriting graphs; call it before the first change.

    Otherwise a graph runs as saved: with the same answers, for more work.
    """
    import torch

    passes = ("_jit_pass_inline", "_jit_pass_cse", "_jit_pass_dce", "parse_ir")
    return not missing_members() and all(hasattr(torch._C, name) for name in passes)


def missing_members() -> List[str]:
    """Return the members of torch's graphs that `runtimes.graph` lists and this torch lacks."""
    import torch

    found = []
    for needed in GRAPH_CLASSES:
        own = getattr(torch._C, needed.__name__, None)
        found += [f"{needed.__name__}.{name}" for name in named_members(needed) if not hasattr(own, name)]
    return found


def named_members(needed: type) -> List[str]:
    """Return the members of a type of `runtimes.graph`: methods, and annotated attributes."""
    names = {*dir(needed), *getattr(needed, "__annotations__", {})}
    return sorted(name for name in names if not name.startswith("_"))


def inline(graph: Graph) -> bool:
    """Inline a graph's calls of methods and functions, as torch does before running a graph.

    torch's own property `inlined_graph` returns a copy, which nobody runs. Returns False if the name is gone.
    """
    import torch

    if not hasattr(torch._C, "_jit_pass_inline"):
        return False
    torch._C._jit_pass_inline(graph)
    return True


def merge_equal(graph: Graph) -> None:
    """Compute repeated expressions only once. Needed by `rewrites`."""
    import torch

    torch._C._jit_pass_cse(graph)


def remove_unread(graph: Graph) -> None:
    """Remove the operators whose outputs nobody reads. Needed by `rewrites`."""
    import torch

    torch._C._jit_pass_dce(graph)


def parse(text: str) -> Graph:
    """Parse a graph in torch's printed form. Needed by `rewrites`."""
    import torch

    parsed: Graph = torch._C.parse_ir(text)  # type: ignore[assignment]  # torch's own types lack members
    return parsed


def type_named(name: str) -> ValueType:
    """Return the type with this name in a graph's text, such as "Tensor[]"; torch's type classes have more unstable
    names."""
    return next(parse(f"graph(%value : {name}):\n  return (%value)").inputs()).type()


# Attention


def attends_in_groups() -> bool:
    """Return whether attention on this CPU reads the keys and values of a group of queries where they are.

    torch 2.13 does, and its own choice of a kernel is asked. Where an earlier one repeats them first, or the name is gone,
    a graph that was traced so stays as it is.
    """
    import torch

    if not rewrites() or not hasattr(torch, "_fused_sdp_choice"):
        return False
    queries, keys, seen = torch.ones(1, 2, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    try:
        kernel = torch._fused_sdp_choice(queries, keys, keys, seen, 0.0, False, scale=None, enable_gqa=True)
    except (RuntimeError, TypeError):
        return False
    return bool(kernel)  # 0 is the one that repeats


# Packed weights


def packable() -> List[torch.dtype]:
    """Return the dtypes whose packed weights a product can read: since torch 2.0, none without oneDNN.

    The operators are for torch's own compiler, and their arguments have changed with it. So one number is packed and
    multiplied here, since a graph would only fail when run. Without them weights stay unchanged: each product packs its
    own.
    """
    import torch

    available: bool = torch.backends.mkldnn.is_available()
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
    """Pack a weight, (outputs, inputs), into oneDNN's layout for about this many rows. Needed by `packable`."""
    import torch

    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def packs_halves() -> bool:
    """Return whether HALF_PRODUCT can be used: FBGEMM, which is for x86. One number is multiplied, as for `packable`.

    Without it, or the name of its weights' type, they are packed in float32.
    """
    import torch

    if not rewrites():
        return False
    number = torch.ones(1, 1)
    try:
        type_named(HALF)
        product = torch.ops.quantized.linear_dynamic_fp16(number, pack_half(number + 1, number[0]))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return bool(product.tolist() == [[3.0]])


def pack_half(weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.ScriptObject:
    """Pack a weight, (outputs, inputs), rounded to float16, with its bias. Needed by `packs_halves`."""
    import torch

    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    return packed


def register(module: Traced, name: str, value: object, type: ValueType) -> None:
    """Add a packed weight to a module read from a file. Needed by `packable`.

    torch's public interface refuses a new name, and a graph cannot hold a packed tensor as a constant.
    """
    script: Any = module
    script._c._register_attribute(name, type, value)


# Running


def set_profiling(wanted: bool) -> bool:
    """Let TorchScript record shapes for two runs and then specialise the graph for them, or not; returns the former
    setting.

    Without the name it keeps its default: with the same answers, but slower first ones.
    """
    import torch

    if not hasattr(torch._C, "_jit_set_profiling_mode"):
        return wanted
    before: bool = torch._C._jit_set_profiling_mode(wanted)
    return before


def settle_compiler(shapes: int) -> None:
    """Make torch.compile (since 2.0) work in this process, for this many shapes, and raise its errors.

    Without one of its settings, torch's default applies: with the same answers, more processes, or without
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
    """Load a package of AOTInductor's machine code; raises MissingPackage where it cannot, since nothing else can run it.

    torch documents this function from 2.6 on; a package only runs with the torch that made it.
    """
    import torch

    inductor: object = getattr(torch, "_inductor", None)
    if not hasattr(inductor, "aoti_load_package"):
        raise MissingPackage(
            f"this archive was compiled by AOTInductor, and torch {torch.__version__} cannot load it: it lacks "
            "torch._inductor.aoti_load_package; build the archive with another save mode"
        )
    with _temporary_folder():
        model: Callable[..., Sequence[torch.Tensor]] = torch._inductor.aoti_load_package(file)
    return model


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    """Let torch's C++ code make its temporary files in a folder that is removed at the end; raises MissingPackage.

    It unpacks a whole model there, and removes that as the model goes: not where its process is killed. The system keeps
    removed files for as long as they are mapped. Python's own temporary folder stays as it is.
    """
    root = tempfile.gettempdir()
    if hasattr(os, "statvfs") and os.statvfs(root).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise MissingPackage(
            f"torch unpacks compiled code into the temporary folder {root}, and no code may run from there (it is mounted with "
            "noexec); set TMPDIR to a folder where it may"
        )
    with _ONE_LOADS:
        before = os.environ.get("TMPDIR")
        folder = tempfile.mkdtemp(prefix="traceserve-")
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before
            shutil.rmtree(folder, ignore_errors=True)
