"""The save modes: what each can write, for which hardware, in which dtypes, and with which options."""

from __future__ import annotations

from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Tuple, Type

from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.tasks.parameters import Parameter

from traceserve.building.config import dtypes
from traceserve.building.config.hardware import FIXED_SHAPES, PARTIAL


class Target(NamedTuple):
    """What a configuration asks of a writer: the hardware, and each of the writer's options for it, by name.

    As a rehearsal, the same graphs are written for this machine's CPU, to be compared before they are compiled.
    """

    hardware: str
    options: Mapping[str, Any]
    rehearsal: bool = False


class Option(NamedTuple):
    """A key under `options` in setup_config.json; of all hardware that the save mode is for, or of these."""

    parameter: Parameter
    hardware: Tuple[str, ...] = ()


class SaveMode(NamedTuple):
    """What a save mode can do: `hardware` × `dtypes` × tasks, see `formats`.

    `loops`: the dtypes in which it has models that are run token by token; none, where it cannot.
    `auto(task, hardware)`: what `"dtype": "auto"` tries, in order.
    `fails_with`: the save modes that cannot write what this one could neither write nor run: they record the same graph, or
    run the same model.
    `measured_against`: the save mode whose float32 artifact the gate measures beside this one's; none for that one itself.
    `refuses`: the keys of a configuration that it cannot have, and why, with what can be.
    """

    hardware: Tuple[str, ...]
    dtypes: Tuple[str, ...]
    loops: Tuple[str, ...]
    auto: Callable[[Type[Task], str], Tuple[str, ...]]
    options: Tuple[Option, ...] = ()
    fails_with: Tuple[str, ...] = ()
    measured_against: Optional[str] = None
    refuses: Mapping[str, str] = {}


COMPILED_BATCHES = (1, 4)
_OF_COMPILERS = (
    Option(
        Parameter(
            "batch_sizes",
            list,
            "the numbers of rows that graphs are compiled for",
            default=[*COMPILED_BATCHES],
            numbers=True,
        ),
        FIXED_SHAPES,
    ),
    Option(
        Parameter("target_length", int, "the most tokens that a decoder writes", least=32, most=4096, default=128),
        FIXED_SHAPES,
    ),
    Option(
        Parameter(
            "least_share",
            float,
            "the build fails where less than this share of a graph's operators is placed on the chip",
            least=0,
            most=1,
            default=0.9,
        ),
        PARTIAL,
    ),
    Option(Parameter("compiler_args", list, "what the compiler is told beside", nullable=True), FIXED_SHAPES),
    Option(
        Parameter(
            "compiler_timeout", int, "seconds after which the compilation of one graph is given up", nullable=True
        ),
        PARTIAL,
    ),
    Option(
        Parameter(
            "compiler_workdir", str, "a folder for what the compiler makes and says; by default it is thrown away"
        ),
        FIXED_SHAPES,
    ),
)

_TORCH_COMPILE = Option(
    Parameter(
        "torch_compile",
        bool,
        "compile the model while the worker loads it (torch.compile, for any shape), which takes it a minute or more; the "
        "worker then needs a C++ compiler",
        default=False,
    )
)

OPSETS = (14, 20)  # scaled dot-product attention came with the first, and torch's exporter ends with the last
OPTIMIZATIONS = ("none", "basic", "extended", "transformers", "fast_gelu")
ONNX_FLOAT32_FILE = "model.float32.onnx"
_OF_ONNX = (
    Option(
        Parameter("opset", int, "ONNX's version of its operators", least=OPSETS[0], most=OPSETS[1], default=17),
    ),
    Option(
        Parameter(
            "optimization",
            str,
            "none; basic: constants are folded, what is redundant is removed; extended: layer norms, GELU and products are "
            "fused, too; transformers: so are attention, embeddings and skip connections, by ONNX Runtime's tool for them; "
            "fast_gelu: and GELU is approximated by tanh, which changes float32 in the fourth digit",
            choices=OPTIMIZATIONS,
            default="extended",
        ),
    ),
    Option(
        Parameter(
            "keep_float32", bool, f"of int8: keep the model in float32 beside it, {ONNX_FLOAT32_FILE}", default=False
        )
    ),
)

SAVE_MODES: Dict[str, SaveMode] = {
    "torchscript": SaveMode(
        hardware=("cpu", "gpu", *FIXED_SHAPES),
        dtypes=("float32", "bfloat16", "float16", "int8"),
        loops=("float32", "bfloat16", "float16"),
        auto=dtypes.fastest,
        options=_OF_COMPILERS,
        fails_with=("onnx",),  # torch's exporter traces as torch.jit.trace does, once for all shapes
    ),
    "pretrained": SaveMode(
        hardware=("cpu", "gpu"),
        dtypes=("float32", "bfloat16", "float16"),
        loops=("float32", "bfloat16", "float16"),
        auto=dtypes.fastest,
        options=(_TORCH_COMPILE,),
        fails_with=("torchscript", "onnx", "aot_inductor"),  # it runs the model as it is
        # A worker runs no code of a checkpoint, whatever the builder was allowed.
        refuses={
            "trust_remote_code": "save_mode pretrained carries no code of a checkpoint into the worker; take a save mode "
            "that writes the model's graph, as torchscript, or leave trust_remote_code out"
        },
    ),
    "onnx": SaveMode(
        hardware=("cpu",),
        dtypes=("float32", "int8"),
        loops=("float32",),
        auto=dtypes.float32_alone,  # not int8: several long tries, for a gain of a tenth to a third
        options=_OF_ONNX,
        measured_against="torchscript",
    ),
    "aot_inductor": SaveMode(
        hardware=("cpu",),
        dtypes=("float32",),
        loops=(),  # torch.export does not take a cache that a model is given from outside
        # Not bfloat16: what `lowering` makes of a model for it is not what torch.export takes (tried with torch 2.13).
        auto=dtypes.float32_alone,
        measured_against="torchscript",
    ),
}
