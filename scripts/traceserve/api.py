"""The Python API, for notebooks and scripts: `traceserve.build` and `traceserve.load`."""

from __future__ import annotations

import contextlib
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import AbstractSet, Any, Callable, Dict, Iterable, Iterator, Mapping, Optional, Sequence, Union

from traceserve_runtime.engine import Engine
from traceserve_runtime.errors import InvalidRequest, TraceserveError
from traceserve_runtime.manifest import MANIFEST_FILE, Manifest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.contract import Body
from traceserve_runtime.protocols.explaining import ExplainedBodies
from traceserve_runtime.protocols.requests import parse_value
from traceserve_runtime.service import Service
from traceserve_runtime.settings import Settings, valid

from traceserve.archives import contents, signing, staging
from traceserve.archives.names import STORE
from traceserve.building.config.parsing import LoadedConfig, check_labels_file, load_config, parse_config
from traceserve.building.config.save_modes import SAVE_MODES
from traceserve.building.config.targets import build_targets
from traceserve.building.gate_options import GateOptions
from traceserve.building.packing import export_and_pack
from traceserve.building.progress import Progress
from traceserve.building.samples import OwnSamples
from traceserve.errors import ConfigError, SignatureError
from traceserve.option_names import named_as_arguments

_EXPLAIN = Headers("application/json", explain=True)

Input = Union[str, Mapping[str, Any], Iterable[Union[str, Mapping[str, Any]]]]


@dataclass(frozen=True)
class BuiltArchive:
    """A built archive: its path, what its worker knows of the model, the build's report (as NAME.report.json), and its notes on
    the checkpoint, a line each."""

    path: Path
    manifest: Manifest
    report: Dict[str, Any]
    note: Optional[str] = None


def build(
    model_name: Union[str, Path, None] = None,
    *,
    config: Union[str, Path, None] = None,
    output: Union[str, Path, None] = None,
    store: Union[str, Path] = STORE,
    samples: Union[str, Path, Iterable[str], None] = None,
    keep_samples: bool = False,
    allow_drift: bool = False,
    force: bool = False,
    version: Optional[str] = None,
    progress: Optional[Progress] = None,
    **keys: Any,
) -> BuiltArchive:
    """Build an archive, as `traceserve build` does: download, trace, compare with the original, pack.

    Args:
        model_name: The checkpoint: a hub id, a folder (relative to the working folder), ...; or give `config`.
        config: A setup_config.json.
        output: The artifact's folder; by default artifacts/ and the last part of model_name.
        store: The folder of archives.
        samples: Your own texts to compare on, or a file of them.
        keep_samples: Keep your samples in the archive, with the original's answers, so that `traceserve verify` asks them too.
        allow_drift: Keep the archive even if its answers differ from the original's.
        force: Replace existing ones.
        version: The archive's version; by default the configuration's, else 1.0.
        progress: Called as `progress(what, done, total)`.
        **keys: Further keys of setup_config.json, such as `task` and `max_length`.

    Raises:
        TraceserveError: with a sentence that says what to do; nothing is left half-made.
    """
    if not isinstance(version, (str, type(None))):
        raise ConfigError(f'version should be a string, such as "{version}", not {type(version).__name__}')
    quiet: Progress = progress or (lambda what, done, total: None)
    with named_as_arguments():
        gate = GateOptions(_own_samples(samples), allow_drift, keep_samples)
        loaded = _configured(model_name if model_name is None else os.fspath(model_name), config, keys)
        written = build_targets(loaded, Path(output) if output else None, Path(store), version, force)
        assert written.archive is not None
        exported = export_and_pack(loaded, written, quiet, gate)
    return BuiltArchive(written.archive, contents.read_manifest(written.archive), exported.report(), exported.note)


def _configured(model_name: Optional[str], config: Union[str, Path, None], keys: Mapping[str, Any]) -> LoadedConfig:
    if (model_name is None) == (config is None):
        raise ConfigError("give either model_name, with other keys of setup_config.json, or config, a file")
    if config is not None:
        if keys:
            raise ConfigError(f"{', '.join(keys)}: write them into {config}, or give model_name in place of config")
        return load_config(Path(config))
    parsed, notes = parse_config({"model_name": model_name, **keys})
    check_labels_file(parsed, Path.cwd())
    return LoadedConfig(parsed, Path.cwd(), notes)


def _own_samples(samples: Union[str, Path, Iterable[str], None]) -> Optional[OwnSamples]:
    if samples is None or isinstance(samples, (str, Path)):
        return OwnSamples.read(Path(samples)) if samples else None
    return OwnSamples.listed(samples)


class LoadedArchive:
    """A loaded archive, which answers in this process as a worker does.

    One thread at a time may ask it; a program of several threads loads one for each, or takes turns with a lock. A forked child
    loads its own: it may ask its parent's only if that is of save mode `onnx` or `openvino`, or was loaded with `threads=1`.
    """

    def __init__(self, engine: Engine, close: Callable[[], object]) -> None:
        """`close` is called when nothing refers to it any more."""
        self.engine = engine
        self._service = Service(engine, engine.manifest.name, engine.manifest.version)
        self._loaded_in = os.getpid()
        self._forks = SAVE_MODES[engine.manifest.save_mode].forks or _has_one_thread()
        weakref.finalize(self, close)

    @property
    def manifest(self) -> Manifest:
        """What the worker knows of the model."""
        return self.engine.manifest

    def __call__(self, inputs: Input, **parameters: Any) -> Any:
        """Return what a server answers, as parsed JSON: for one input what transformers.pipeline returns for it, such as an
        object with label and score, or a list of these with `top_k`; for a list of inputs a list, one item for each.

        Args:
            inputs: A text; an object of the task's fields, such as `{"question": ..., "context": ...}`; or a list, or
                another iterable, of either, which gives a list of answers, in order.
            **parameters: The task's parameters, such as `top_k`; but `stream`, since a written text is returned whole.

        Raises:
            InvalidRequest, InputTooLong: what is wrong with the input, as a server's 400 and 413.
            TraceserveError: It was loaded before a fork, see above.
        """
        served = self._service.served
        return self._answered(parse_value(_asked(inputs, parameters), served.task, 0, served.manifest.max_rows))

    def explain(self, inputs: Input, **parameters: Any) -> Any:
        """Return how much each word added to an answer, as `/explanations/NAME` and `traceserve explain` do.

        An explanation is an object with the answer, what is explained (`target`) and the `words` with their attributions;
        for a list of inputs a list of these.

        Args:
            inputs: As of a call.
            **parameters: The task's parameters, and those of explanations, such as `label`, `method` and `steps`.

        Raises:
            InvalidRequest, InputTooLong: what is wrong with the input.
            TraceserveError: Answers of the task are not explained, or it took too long.
        """
        body = {"body": _asked(inputs, parameters)}
        return self._answered(ExplainedBodies().read(body, _EXPLAIN, self._service.served, 0))

    def _answered(self, call: Body) -> Any:
        answers = []
        if os.getpid() != self._loaded_in and not self._forks:
            raise TraceserveError(
                "this archive was loaded before the process was forked, and torch would wait for threads that only the parent "
                "has; load it in the child (after gunicorn's fork: without --preload), or with threads=1, or build it with "
                "the save mode onnx or openvino"
            )
        if any(map(self.engine.task.streams, call.requests)):
            raise InvalidRequest("a text is written whole here, and streamed by a server; leave stream out", "stream")
        for answer in self.engine.answer(call.requests):
            if isinstance(answer, TraceserveError):
                raise answer
            answers.append(answer)
        return call.protocol.reply(answers, self._service.served)


def load(
    archive: Union[str, Path, BuiltArchive],
    device: str = "cpu",
    require_signature: Union[str, Path, None] = None,
    threads: Optional[int] = None,
) -> LoadedArchive:
    """Load an archive (or an artifact's folder) into this process, ready to answer.

    Args:
        archive: A .mar file, a folder that `traceserve export` made, or what `build` returned.
        device: "cpu", or a GPU's name for an archive with `"hardware": "gpu"`.
        require_signature: A PEM file, a public key or certificates: only an archive that is signed by it is loaded, as by
            `traceserve serve --require-signature`.
        threads: Of each operator, 1 or more; by default the number that the save mode's library takes. torch counts them for
            the whole process.

    Raises:
        TraceserveError: The archive is damaged, or not signed as required, or needs what this machine lacks.
    """
    if threads is not None and not valid("threads", threads):
        raise ConfigError(f"threads is {threads!r}; it should be 1 or more, or None for the library's own number")
    path = archive.path if isinstance(archive, BuiltArchive) else Path(archive)
    trusted = Path(require_signature) if require_signature is not None else None
    if (path / MANIFEST_FILE).is_file():
        if trusted is not None:
            raise SignatureError(f"{path} is a folder, and only an archive (.mar) is signed")
        return LoadedArchive(_ready(path, device, threads), lambda: None)
    with contextlib.ExitStack() as stack:
        unpacked = stack.enter_context(staging.scratch())
        with signing.verified([path], trusted) as [checked]:
            contents.unpack(checked, unpacked)
        engine = _ready(unpacked, device, threads)
        return LoadedArchive(engine, stack.pop_all().close)


def _has_one_thread() -> bool:
    """Return whether torch, which the archive's reader has imported, computes in the calling thread alone."""
    import torch

    return torch.get_num_threads() == 1


def _asked(inputs: Input, parameters: Mapping[str, Any]) -> object:
    """Return the body of a request, as JSON has it."""
    return _plain({"inputs": inputs, **({"parameters": parameters} if parameters else {})})


def _plain(value: object) -> object:
    """Return a value as JSON has it: any mapping as an object, any sequence, set, iterator, array or Series as a list, and
    a number of numpy as Python's. Raises InvalidRequest for what JSON lacks, but bytes."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (Sequence, AbstractSet, Iterator)) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise InvalidRequest(f"a request holds texts, numbers, lists and objects, and no {type(value).__name__}")


def _ready(folder: Path, device: str, threads: Optional[int]) -> Engine:
    engine = Engine.load(folder, device, Settings(threads=threads))
    engine.warm_up()
    engine.scheduler.open_lanes()
    return engine
