"""The save mode aot_inductor: `torch.export`, compiled to machine code for this processor, as a `.pt2` package."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterator, Tuple, Type

import torch
from traceserve_runtime import processor
from traceserve_runtime.errors import reason
from traceserve_runtime.runtimes.aot_inductor import INSTRUCTIONS, MACHINE, TORCH
from traceserve_runtime.versions import release_of

from traceserve.archives.contents import EPOCH
from traceserve.building.checkpoints.original import Original
from traceserve.building.config.save_modes import Target
from traceserve.building.writers.contract import Written
from traceserve.building.writers.lowering import precision
from traceserve.building.writers.tracing import torch_internals
from traceserve.building.writers.tracing.graphs import TRACED_BATCH, TRACED_LENGTH
from traceserve.building.writers.tracing.wrapping import example, masks_without_vmap, once, positions_by_length
from traceserve.errors import ExportError, UnwritableError
from traceserve.machine import space

if TYPE_CHECKING:
    from traceserve_runtime.manifest import Shapes
    from traceserve_runtime.tasks.contract import Task

MODEL_FILE = "model.pt2"
COMPILERS = ("g++", "clang++")
# The worker chooses the number of threads; and without line tables, which contain this machine's paths.
_CONFIGS: Dict[str, object] = {"cpp.dynamic_threads": True, "aot_inductor.enable_line_tables": False}


def check(dtype: str, target: Target) -> None:
    """Raise ExportError without a C++ compiler, or a torch that packages compiled models."""
    precision.check_processor(dtype)
    if release_of(torch.__version__) < (2, 6) or not torch_internals.compiles_packages():
        raise ExportError(f"save_mode aot_inductor needs torch 2.6 or newer; this is {torch.__version__}")
    compiler()


def compiler() -> str:
    """Return torch's C++ compiler; raises ExportError without one."""
    wanted = os.environ.get("CXX")
    found = wanted or COMPILERS[0]
    if shutil.which(found) is None:
        raise ExportError(
            f"save_mode aot_inductor compiles C++, and {found} is not on the PATH; install it (the Debian "
            f"package g++), or name another compiler with the environment variable CXX ({', '.join(COMPILERS)})"
        )
    return found


def write(original: Original, task: Type[Task], shapes: Shapes, folder: Path, target: Target) -> Written:
    """Write `folder/model.pt2`; see Writer. Raises ExportError with torch's or the compiler's reason."""
    module, inputs = _module(original, task, shapes)
    # For the package and its copy without sources. Torch's package writer aborts the process on a full disk.
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.parameters())
    space.require_space(folder, 2 * size, f"{MODEL_FILE}, the compiled model,")
    exported: Any = torch.export
    try:
        with _quiet(), masks_without_vmap(), positions_by_length(original.model), torch.no_grad():
            program = exported.export(module, inputs, dynamic_shapes=(_sizes(shapes, len(inputs)),))
        with _quiet(), torch.no_grad(), tempfile.TemporaryDirectory(prefix=".compiled.", dir=folder) as scratch:
            package = Path(scratch, MODEL_FILE)
            torch_internals.compile_package(program, package, _CONFIGS)
            _repack(package, folder / MODEL_FILE)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError, OSError) as error:
        raise UnwritableError(
            f"torch.export and AOTInductor cannot compile {type(original.model).__name__}: {reason(error)}"
        ) from error
    return Written(
        runtime={
            TORCH: torch.__version__,
            MACHINE: platform.machine(),
            INSTRUCTIONS: sorted(processor.instructions()),
        }
    )


def _module(original: Original, task: Type[Task], shapes: Shapes) -> Tuple[torch.nn.Module, Tuple[torch.Tensor, ...]]:
    length = max(shapes.lengths) if shapes.lengths else min(TRACED_LENGTH, original.max_length)
    module = once(original, [output.name for output in task.outputs])
    return module.eval(), example(original, TRACED_BATCH, length)


def _sizes(shapes: Shapes, inputs: int) -> Tuple[Dict[int, object], ...]:
    """Return each input's variable sizes: the batch, and the length if there are several."""
    exported: Any = torch.export
    one_length = shapes.lengths is not None and len(shapes.lengths) == 1
    return tuple(dict.fromkeys((0,) if one_length else (0, 1), exported.Dim.DYNAMIC) for _ in range(inputs))


def _repack(package: Path, file: Path) -> None:
    """Copy the package without its C++ sources, which grow with every build, and its random number, for deterministic
    bytes.

    The code still contains the name of torch's cache folder, which depends on the user and TMPDIR.
    """
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
        for name in sorted(source.namelist()):
            if not name.endswith(".cpp"):
                content = source.read(name)
                plain = b"0" * len(content) if name.endswith("serialization_id") else content
                target.writestr(zipfile.ZipInfo(name, EPOCH), plain)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
