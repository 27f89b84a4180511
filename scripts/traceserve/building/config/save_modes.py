"""The save modes, with their hardware, dtypes and options."""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Tuple, Type

from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.tasks.parameters import Parameter

from traceserve.building.config import dtypes
from traceserve.building.config.hardware import FIXED_SHAPES, PARTIAL


class Target(NamedTuple):
    """A configuration's request to a writer: the hardware, and the writer's options for it, by name.

    A rehearsal writes the same graphs for this machine's CPU, to compare them before compilation.
    """

    hardware: str
    options: Mapping[str, Any]
    rehearsal: bool = False


class Option(NamedTuple):
    """A key under `options` in setup_config.json; for all hardware of the save mode, or for these."""

    parameter: Parameter
    hardware: Tuple[str, ...] = ()


class SaveMode(NamedTuple):
    """The capabilities of a save mode: `hardware` × `dtypes` × tasks, see `formats`.

    `loops`: the dtypes in which it supports models that run token by token; empty if none. `auto(task, hardware)`: the
    candidates of `"dtype": "auto"`, in order. `reads_weights`: whether it has the dtypes that only weights have on some
    hardware. `fails_with`: the save modes that fail on every model on which this one fails: they record the same graph, or
    run the same model. `measured_against`: the save mode whose float32 artifact the gate measures beside this one's; none
    for itself. `refuses`: invalid configuration keys, and why, with alternatives. `forks`: whether an archive that was loaded
    before a fork answers in the child; torch would wait for its threads there. `packages`: what its reader needs besides a
    worker's. `int8_right_everywhere`: whether its int8 is only slow, not wrong, on processors that lack it.
    """

    hardware: Tuple[str, ...]
    dtypes: Tuple[str, ...]
    loops: Tuple[str, ...]
    auto: Callable[[Type[Task], str], Tuple[str, ...]]
    options: Tuple[Option, ...] = ()
    reads_weights: bool = False
    fails_with: Tuple[str, ...] = ()
    measured_against: Optional[str] = None
    refuses: Mapping[str, str] = {}
    forks: bool = False
    packages: Tuple[str, ...] = ()
    int8_right_everywhere: bool = False


COMPILED_BATCHES = (1, 4)
_OF_COMPILERS = (
    Option(
        Parameter(
            "batch_sizes",
            list,
            "the batch sizes that graphs are compiled for",
            default=[*COMPILED_BATCHES],
            numbers=True,
        ),
        FIXED_SHAPES,
    ),
    Option(
        Parameter("target_length", int, "the most tokens a decoder writes", least=32, most=4096, default=128),
        FIXED_SHAPES,
    ),
    Option(
        Parameter(
            "least_share",
            float,
            "the build fails if less than this share of a graph's operators is placed on the chip",
            least=0,
            most=1,
            default=0.9,
        ),
        PARTIAL,
    ),
    Option(Parameter("compiler_args", list, "additional compiler arguments", nullable=True), FIXED_SHAPES),
    Option(
        Parameter("compiler_timeout", int, "time limit in seconds for compiling one graph", nullable=True),
        PARTIAL,
    ),
    Option(
        Parameter("compiler_workdir", str, "a folder for the compiler's output and logs; by default discarded"),
        FIXED_SHAPES,
    ),
)

_TORCH_COMPILE = Option(
    Parameter(
        "torch_compile",
        bool,
        "compile the model while the worker loads it (torch.compile, for any shape), which takes a minute or more; the "
        "worker then needs a C++ compiler",
        default=False,
    )
)

OPSETS = (14, 20)  # the first has scaled dot-product attention, the last is torch's exporter's latest
OPTIMIZATIONS = ("none", "basic", "extended", "transformers", "fast_gelu")
ONNX_FLOAT32_FILE = "model.float32.onnx"
_OF_ONNX = (
    Option(
        Parameter("opset", int, "the version of ONNX's operators", least=OPSETS[0], most=OPSETS[1], default=17),
    ),
    Option(
        Parameter(
            "optimization",
            str,
            "none; basic: folds constants, removes redundant nodes; extended: also fuses layer norms, GELU and matrix "
            "products; transformers: also attention, embeddings and skip connections, with ONNX Runtime's tool; "
            "fast_gelu: also approximates GELU by tanh, which changes float32 in the fourth digit",
            choices=OPTIMIZATIONS,
            default="extended",
        ),
    ),
    Option(
        Parameter("keep_float32", bool, f"for int8: also keep the float32 model, {ONNX_FLOAT32_FILE}", default=False)
    ),
)

SAVE_MODES: Dict[str, SaveMode] = {
    "torchscript": SaveMode(
        hardware=("cpu", "gpu", *FIXED_SHAPES),
        dtypes=("float32", "bfloat16", "float16", "int8"),
        loops=("float32", "bfloat16", "float16"),
        auto=dtypes.fastest_in_torchscript,
        options=_OF_COMPILERS,
        reads_weights=True,
        fails_with=("onnx", "openvino"),  # both trace like torch.jit.trace, once for all shapes
    ),
    "pretrained": SaveMode(
        hardware=("cpu", "gpu"),
        dtypes=("float32", "bfloat16", "float16"),
        loops=("float32", "bfloat16", "float16"),
        auto=dtypes.fastest,
        options=(_TORCH_COMPILE,),
        fails_with=("torchscript", "onnx", "openvino", "aot_inductor"),  # it runs the model unchanged
        # A worker runs no code of a checkpoint, whatever the builder may.
        refuses={
            "trust_remote_code": "save_mode pretrained carries no code of a checkpoint into the worker; take a save mode "
            "that writes the model's graph, as torchscript, or leave trust_remote_code out"
        },
        packages=("transformers",),
    ),
    "onnx": SaveMode(
        hardware=("cpu",),
        dtypes=("float32", "int8"),
        loops=("float32",),
        auto=dtypes.float32_alone,  # not int8: several long attempts for a gain of a tenth to a third
        options=_OF_ONNX,
        measured_against="torchscript",
        forks=True,
        packages=("onnxruntime",),
        int8_right_everywhere=True,
    ),
    "openvino": SaveMode(
        hardware=("cpu",),
        dtypes=("float32", "bfloat16", "int8"),
        loops=("float32", "bfloat16", "int8"),
        auto=dtypes.fastest_in_openvino,
        measured_against="torchscript",
        forks=True,
        packages=("openvino",),
    ),
    "aot_inductor": SaveMode(
        hardware=("cpu",),
        dtypes=("float32",),
        loops=(),  # torch.export does not accept a cache from outside
        # Not bfloat16: torch.export does not accept `lowering`'s model (tried with torch 2.13).
        auto=dtypes.float32_alone,
        measured_against="torchscript",
    ),
}
