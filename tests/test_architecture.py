"""Checks the architecture's rules by reading the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Sequence, Set, Tuple

import private_names
import pytest
from conftest import ROOT
from traceserve.building.checkpoints.libraries import LOADERS
from traceserve.building.config.dtypes import DTYPES
from traceserve.building.config.hardware import FIXED_SHAPES, HARDWARE
from traceserve.building.config.libraries import LIBRARIES
from traceserve.building.config.loops import LOOPS
from traceserve.building.config.save_modes import OPTIMIZATIONS, SAVE_MODES
from traceserve.building.config.setup_config import SetupConfig
from traceserve.building.gate.loops import FORCED
from traceserve.building.writers import WRITERS
from traceserve.building.writers.lowering.precision import PRECISIONS, ROUNDED
from traceserve.building.writers.neuron.compilers import COMPILERS
from traceserve.building.writers.onnx.optimization import LEVELS
from traceserve.building.writers.tracing.loops import LOOP_GRAPHS
from traceserve_runtime.generation.steps import FEEDS
from traceserve_runtime.runtimes import RUNTIMES
from traceserve_runtime.runtimes.torchscript.neuron import CHIPS
from traceserve_runtime.tasks import TASKS

HANDLERS, SCRIPTS = ROOT / "handlers", ROOT / "scripts"
RUNTIME = HANDLERS / "traceserve_runtime"
FILES = sorted([*HANDLERS.rglob("*.py"), *SCRIPTS.rglob("*.py")])
HEAVY = {
    "transformers",
    "onnxruntime",
    "openvino",
    "nncf",
    "torch_neuron",
    "torch_neuronx",
    "captum",
    "traceserve",
    "ts",
    "huggingface_hub",
}


def imports(path: Path, module_level: bool = False) -> Iterator[str]:
    """Yield a file's imports, anywhere or at module level; without type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if not module_level else list(at_module_level(tree.body))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # it may be a module too


def at_module_level(body: List[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from at_module_level(getattr(node, "body", []) if isinstance(node, (ast.If, ast.Try, ast.With)) else [])


def roots(path: Path, module_level: bool = False) -> Set[str]:
    return {name.split(".")[0] for name in imports(path, module_level)}


@pytest.mark.parametrize("path", sorted(RUNTIME.rglob("*.py")), ids=lambda p: str(p.relative_to(HANDLERS)))
def test_the_runtime_imports_neither_builder_nor_torch(path: Path) -> None:
    assert "traceserve" not in roots(path)
    assert not roots(path, module_level=True) & (HEAVY | {"torch"})
    if RUNTIME / "runtimes" not in path.parents:
        assert "torch" not in roots(path)


@pytest.mark.parametrize("path", sorted(RUNTIME.rglob("*.py")), ids=lambda p: str(p.relative_to(HANDLERS)))
def test_the_runtime_begins_with_three_packages(path: Path) -> None:
    """Other packages of a worker (jinja2 for chats, a reader's library) are imported where they are used."""
    known = {*sys.stdlib_module_names, "numpy", "tokenizers", "traceserve_runtime"}
    assert roots(path, module_level=True) <= known


# Each floor of the serving side imports from those below it and from its own folder; none from its own floor.
RUNTIME_FLOORS: Sequence[Set[str]] = (
    {"json_types", "largest", "memory", "softmax", "frontend_socket", "worker_context", "versions"},
    {"errors"},
    {"processor", "settings"},
    {"failures", "manifest", "runner"},
    {"texts"},
    {"batching"},
    {"explaining"},
    {"generation", "runtimes"},
    {"tasks"},
    {"pending"},
    {"explanations"},
    {"engine", "protocols", "mirror"},
    {"streaming"},
    {"service"},
    {"rounds"},
)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def edges_of(root: Path, package: str) -> Dict[str, Set[str]]:
    """Return which files of a package import which others, anywhere in the file, including type checking."""
    files = {module_name(path, root): path for path in sorted((root / package).rglob("*.py"))}

    def imported(path: Path) -> Iterator[str]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                named = [f"{node.module}.{alias.name}" for alias in node.names]  # each a file, or in the module
                yield from (name if name in files else str(node.module) for name in named)

    return {name: {other for other in imported(path) if other in files} for name, path in files.items()}


def circles(edges: Mapping[str, Set[str]]) -> List[str]:
    """Return one circle of imports, or none. A package's own file is above its folder's modules."""
    done: Set[str] = set()

    def visit(name: str, way: List[str]) -> List[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges[name]):
            found = visit(other, [*way, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) for found in [visit(name, [])] if found), [])


def climbs(edges: Mapping[str, Set[str]], floors: Sequence[Set[str]]) -> List[Tuple[str, str]]:
    """Return a wing's imports from the same floor or a higher one; a wing is a folder or file of the package."""
    floor_of = {wing: number for number, wings in enumerate(floors) for wing in wings}

    def wing(name: str) -> str:
        return (name.split(".") + [""])[1]

    return [
        (name, other)
        for name, others in edges.items()
        for other in others
        if wing(name) and wing(other) and wing(name) != wing(other)
        if floor_of[wing(other)] >= floor_of[wing(name)]
    ]


def within(edges: Mapping[str, Set[str]], package: str) -> Dict[str, Set[str]]:
    """Return the imports between one folder's files, by names that begin with the folder's own."""
    start = package.rfind(".") + 1
    own = {name for name in edges if name.startswith(f"{package}.")}
    return {name[start:]: {other[start:] for other in edges[name] & own} for name in own}


# The builder's floors, like the serving side's. Serving and building only meet at the archive.
BUILDER_FLOORS: Sequence[Set[str]] = (
    {"errors", "option_names"},
    {"machine"},
    {"archives"},
    {"serving", "building"},
    {"measuring", "deploying", "playground"},
    {"checking"},
    {"rollout"},
    {"commands", "api"},
    {"cli"},
    {"__main__"},
)
# Possibilities (`config`) are separate from implementations; writers and the gate do not know each other.
BUILDING_FLOORS: Sequence[Set[str]] = (
    {"config", "progress", "samples"},
    {"checkpoints", "gate_options"},
    {"writers", "gate", "speeds", "products"},
    {"artifact", "exported", "explaining"},
    {"attempt", "proposal"},
    {"export"},
    {"packing"},
)


def test_the_builder_has_floors() -> None:
    edges = edges_of(SCRIPTS, "traceserve")
    assert not climbs(edges, BUILDER_FLOORS)
    assert not climbs(within(edges, "traceserve.building"), BUILDING_FLOORS)
    assert not circles(edges)


# Imports that need an optional package, whose absence has its own message.
OF_OPTIONAL_PACKAGES = {"traceserve.building.checkpoints.libraries.curated_models"}


def lazy_imports(path: Path) -> Iterator[str]:
    """Return the builder's own modules that a file imports inside functions."""
    functions = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, FUNCTIONS)]
    for node in (node for function in functions for node in ast.walk(function)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "traceserve":
            yield str(node.module)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda p: str(p.relative_to(SCRIPTS)))
def test_only_commands_import_lazily(path: Path) -> None:
    """Commands do so to start quickly; elsewhere a lazy import would hide a circle."""
    if path.parent.name != "commands" and path.name != "cli.py":
        assert set(lazy_imports(path)) <= OF_OPTIONAL_PACKAGES


def test_the_serving_side_has_floors() -> None:
    edges = edges_of(HANDLERS, "traceserve_runtime")
    assert not climbs(edges, RUNTIME_FLOORS)
    assert not circles(edges)


def test_a_circle_and_a_climb_are_found(tmp_path: Path) -> None:
    """Proves that the test above can fail: lazy and type-checking imports count."""
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("def f():\n    from house import high\n")
    (package / "high.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.low import f\n"
    )
    edges = edges_of(tmp_path, "house")
    assert climbs(edges, ({"low"}, {"high"})) == [("house.low", "house.high")]
    assert climbs(
        within({f"of.{name}": {f"of.{o}" for o in edges[name]} for name in edges}, "of.house"), ({"low"}, {"high"})
    )
    assert list(lazy_imports(package / "low.py")) == []
    assert circles(edges) == ["house.high", "house.low", "house.high"]


def test_tasks_and_runtimes_do_not_know_each_other() -> None:
    """They meet in the engine, and no module between them imports both."""
    edges = edges_of(HANDLERS, "traceserve_runtime")
    for name, others in edges.items():
        if name.split(".")[1:2] != ["runtimes"]:
            assert name == "traceserve_runtime.engine" or not any(".runtimes" in other for other in others)
        else:
            assert not any(".tasks" in other for other in others)


@pytest.mark.parametrize(
    "line", ["import traceserve_runtime.runtimes", "from traceserve_runtime import runtimes", "def f(): import torch"]
)
def test_no_import_is_overlooked(line: str, tmp_path: Path) -> None:
    """Proves that the tests above can fail."""
    (tmp_path / "x.py").write_text(line)
    assert {"traceserve_runtime.runtimes", "torch"} & set(imports(tmp_path / "x.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_of_the_tables_are_not_compared(path: Path) -> None:
    names = {*TASKS, *RUNTIMES, *WRITERS, *LIBRARIES}
    if SCRIPTS in path.parents:
        names |= set(HARDWARE)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            strings = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            assert not strings & names, f"line {node.lineno}"


def test_each_border_is_crossed_in_one_place() -> None:
    assert {p.name for p in FILES if "ts" in roots(p)} <= {"transformer_handler.py"}
    assert {p.name for p in FILES if "model_archiver" in p.read_text()} == {"archive.py"}
    assert {p.relative_to(ROOT).as_posix() for p in FILES if "openvino" in roots(p)} == {
        "handlers/traceserve_runtime/runtimes/openvino.py"  # without its telemetry
    }
    assert {p.relative_to(ROOT).as_posix() for p in FILES if "onnxruntime" in roots(p)} == {
        "handlers/traceserve_runtime/runtimes/onnx.py",  # without its telemetry
        "scripts/traceserve/building/writers/onnx/optimization.py",  # a part of it, after `onnx_runtime`
    }
    assert {p.name for p in FILES if "ray" in roots(p)} <= {"ray_serve.py", "ray_cluster.py"}


def test_hosts_import_no_runtime_but_an_archives_own() -> None:
    """Imports of a host's module would be loaded before the archive's own runtime."""
    fetches = "fetching.py"  # a separate process
    hosts = sorted((HANDLERS / "traceserve_hosts").glob("*.py"))
    for path in hosts:
        if path.name != fetches:
            assert not roots(path, module_level=True) & {"traceserve_runtime", "traceserve"}, path.name
    assert len(hosts) > 6


# The files that use private names of torch; and the one name of another library that a file may use.
TORCH_INTERNALS = {
    "handlers/traceserve_runtime/runtimes/torch_internals.py",
    "scripts/traceserve/building/writers/tracing/torch_internals.py",
}
OF_OTHERS = {
    "handlers/traceserve_hosts/ray_serve.py": "replica",  # ray.serve._private.replica: where its gRPC server listens
    "handlers/traceserve_runtime/frontend_socket.py": "_retrieve_buffer",  # TorchServe's
    "handlers/traceserve_runtime/runtimes/calling.py": "_shift_right",  # the rest is transformers'
    "scripts/traceserve/building/checkpoints/generation.py": "_from_model_config",
    "scripts/traceserve/building/writers/onnx/export.py": "_attn_implementation",
    "scripts/traceserve/building/writers/tracing/wrapping.py": "_vmap_for_bhqkv",
}
OWN = {name for path in FILES for name in private_names.defined(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_of_others_are_used_in_one_place(path: Path) -> None:
    """Each in a function that says what happens without it; tests/test_private_names.py removes them."""
    found, name = private_names.of_others(path, OWN), path.relative_to(ROOT).as_posix()
    if name in TORCH_INTERNALS:
        assert found
    else:
        assert {text.split(".")[-1] for text in found} == {OF_OTHERS[name]} if name in OF_OTHERS else not found


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._jit_pass_inline(graph)",
        "types = torch._C.ListType(torch._C.TensorType.get())",
        "torch.ops.mkldnn._reorder_linear_weight(weight, 32)",
        "import torch._inductor.config as inductor",
        "from torch import _dynamo",
        "from torch._C import parse_ir",
        "module._c.setattr('weight', tensor)",
        "hasattr(torch, '_int_mm')",
        "sys.modules['ts.protocol.otf_message_handler']._retrieve_buffer = reader",
    ],
)
def test_no_private_name_is_overlooked(line: str, tmp_path: Path) -> None:
    """Whatever the project's own names."""
    (tmp_path / "x.py").write_text(line)
    assert private_names.of_others(tmp_path / "x.py", {"_C", "_c"})


def prints(path: Path) -> List[int]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_only_commands_print() -> None:
    assert {p.parent.name for p in FILES if prints(p)} <= {"commands"}


def broad_excepts(path: Path) -> List[Tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    return [(path.name, h.lineno) for h in handlers if h.type is None or getattr(h.type, "id", "") == "Exception"]


def test_broad_excepts_stand_at_the_edges_and_around_foreign_code() -> None:
    edges = {"transformer_handler.py", "cli.py"}
    # Errors are isolated per request: here a batch is taken apart, and each of its requests gets an answer.
    requests = {"engine.py", "failures.py", "service.py", "batcher.py", "loop.py"}
    # transformers, tokenizers, peft, a TorchServe that may be absent, a checkpoint's own chat template; fsspec's
    # packages for each storage; model-signing, which parses strangers' signatures; torch's counter of operations, which
    # hooks into every module; and what a reader's library raises while a run is measured.
    foreign = {
        "loading.py",
        "measuring.py",
        "fetching.py",
        "tokenizers.py",
        "head_weights.py",
        "adapter_weights.py",
        "transformers.py",
        "tokenization.py",
        "server.py",
        "chat.py",
        "pretrained.py",
        "products.py",
        "signing.py",
    }
    allowed = edges | requests | foreign
    assert {name for path in FILES for name, _ in broad_excepts(path)} <= allowed


def test_tables_agree() -> None:
    assert set(WRITERS) == set(RUNTIMES)


def test_what_can_be_is_what_is_done() -> None:
    """The tables of `config` and of the code have the same keys, and only name each other's rows."""
    assert set(SAVE_MODES) == set(WRITERS)
    assert set(DTYPES) == set(PRECISIONS)
    assert set(LIBRARIES) == set(LOADERS)
    assert set(FIXED_SHAPES) == set(COMPILERS) == set(CHIPS)
    assert (
        set(LOOPS)
        == set(LOOP_GRAPHS)
        == set(FORCED)
        == set(FEEDS)
        == {task.loop for task in TASKS.values() if task.loop}
    )
    assert set(OPTIMIZATIONS) == set(LEVELS)
    for kind in SAVE_MODES.values():
        assert (
            set(kind.hardware) <= set(HARDWARE) and set(kind.dtypes) <= set(DTYPES) and set(kind.loops) <= set(DTYPES)
        )
        assert set(kind.fails_with) | ({kind.measured_against} - {None}) <= set(SAVE_MODES)
        assert all(set(option.hardware) <= set(kind.hardware) for option in kind.options)
        assert set(kind.refuses) <= set(SetupConfig.model_fields)
    assert {name for name, dtype in DTYPES.items() if dtype.of_weights} == set(ROUNDED)
    for dtype in DTYPES.values():
        assert not set(dtype.of_weights) & set(dtype.hardware) and set(dtype.of_weights) <= set(HARDWARE)
        assert set(dtype.by_compiler) | set(dtype.where_native) <= set(dtype.hardware) <= set(HARDWARE)
    assert all(set(library.save_modes or ()) <= set(SAVE_MODES) for library in LIBRARIES.values())


def test_what_can_be_is_read_without_torch() -> None:
    modules = [module_name(path, SCRIPTS) for path in sorted((SCRIPTS / "traceserve/building/config").glob("*.py"))]
    code = f"import sys, {', '.join(modules)}\nprint(sorted({{'torch', 'transformers', 'huggingface_hub'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert result.stdout.strip() == "[]" and len(modules) > 10


# Names that several modules give to a class or a function: each keeps a contract, and its caller takes the module from a
# table or runs it. Any other name is said once, so that it can be searched for.
_WRITERS, _RUNTIMES = "scripts/traceserve/building/writers/", "handlers/traceserve_runtime/runtimes/"
_ENGINES = "scripts/traceserve/rollout/engines/on_"
CONTRACT_VERBS: Dict[str, Sequence[str]] = {
    "write": (_WRITERS,),  # WRITERS: see `writers.contract.Writer`
    "check": (_WRITERS,),
    "lowered": (_WRITERS,),
    "note": (_WRITERS,),
    # RUNTIMES; and the settings, which hosts read by the runtime of an archive, which may be an older one.
    "read": (_RUNTIMES, "handlers/traceserve_runtime/settings.py"),
    "variants": (_RUNTIMES,),
    "load": (
        "scripts/traceserve/building/checkpoints/libraries/",
        "scripts/traceserve/api.py",
    ),  # LOADERS; the public name
    # ROLLOUT_ENGINES: see `rollout.engines.contract.RolloutEngine`
    "check_running_server": (_ENGINES,),
    "check_update": (_ENGINES,),
    "begin_update": (_ENGINES,),
    "versions_of": (_ENGINES,),
    "running_version": (_ENGINES,),
    "start_beside": (_ENGINES,),
    "path_of_running": (_ENGINES,),
    "switch_to": (_ENGINES,),
    "drain_version": (_ENGINES,),
    "remove_version": (_ENGINES,),
    "plan": ("scripts/traceserve/deploying/targets/",),  # TARGETS
    "main": (
        "scripts/traceserve/cli.py",
        "scripts/traceserve/deploying/inside/",
        "handlers/traceserve_hosts/",
    ),  # programs
}


def same_names(root: Path) -> Dict[str, List[str]]:
    """The public classes and functions that several modules define under one name, contracts aside, and their files."""
    found: Dict[str, List[str]] = {}
    for path in sorted([*root.glob("handlers/**/*.py"), *root.glob("scripts/**/*.py")]):
        file = path.relative_to(root).as_posix()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if not file.startswith(tuple(CONTRACT_VERBS.get(node.name, ()))):
                found.setdefault(node.name, []).append(file)
    return {name: files for name, files in found.items() if len(files) > 1 or name in CONTRACT_VERBS}


def test_names_are_unique() -> None:
    assert same_names(ROOT) == {}


def test_a_name_that_is_given_twice_is_found(tmp_path: Path) -> None:
    files = {
        "handlers/traceserve_runtime/one.py": "def fit() -> None: ...\ndef _own() -> None: ...\nclass Search: ...\n",
        "scripts/traceserve/other.py": "def fit() -> None: ...\ndef _own() -> None: ...\ndef write() -> None: ...\n",
        "scripts/traceserve/building/writers/onnx.py": "def write() -> None: ...\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    one, other, _ = files
    assert same_names(tmp_path) == {"fit": [one, other], "write": [other]}


@pytest.mark.parametrize(
    "arguments",
    [
        [str(HANDLERS), str(SCRIPTS)],  # annotations are not evaluated (`from __future__ import annotations`)
        ["--eval-annotations", str(SCRIPTS / "traceserve/building/config/setup_config.py")],  # but by pydantic
    ],
    ids=["all", "annotations"],
)
def test_the_code_runs_on_python_3_8(arguments: List[str]) -> None:
    program = Path(sys.executable).with_name("vermin")
    command = [str(program), "--target=3.8-", "--no-tips", "--violations", "--quiet", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout


def test_nothing_of_a_machine_is_in_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file() and name != "tests/test_architecture.py":
            text = (ROOT / name).read_bytes()
            for word in (b"/home/", b"/root/", b"/work/"):
                assert word not in text, f"{name}: {word!r}"
