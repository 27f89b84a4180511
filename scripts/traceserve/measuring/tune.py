"""Finds the best serving configuration on this machine for a user's own texts, by measuring real servers."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import yaml
from traceserve_runtime import processor, settings
from traceserve_runtime.batching.costs import CostModel
from traceserve_runtime.engine import Engine, load_task
from traceserve_runtime.errors import TraceserveError
from traceserve_runtime.manifest import Manifest
from traceserve_runtime.protocols.bodies import Headers
from traceserve_runtime.protocols.requests import parse_requests
from traceserve_runtime.tasks.contract import Task
from traceserve_runtime.texts.rows import Encoded

from traceserve.archives.contents import read_manifest, read_serving, unpack
from traceserve.archives.model_config import Serving
from traceserve.archives.staging import scratch
from traceserve.building.progress import Progress
from traceserve.building.samples import OwnSamples
from traceserve.errors import ConfigError, ServerError
from traceserve.measuring import load_generator, targets, transfers
from traceserve.measuring.candidates import settings_to_try
from traceserve.measuring.load_generator import Endpoint, Result
from traceserve.measuring.padding import Waste, wastes
from traceserve.measuring.search import Goal, ServingSearch, Trial
from traceserve.serving import configuration, instances, server
from traceserve.serving.engines import TORCHSERVE
from traceserve.serving.instances import Instance

_SHORTEST, _LONGEST = 0.5, 2.5  # seconds per measurement, if the budget allows
_ENOUGH = 50  # requests per measurement
_COLD, _WARM = 1.5, 0.3  # warm-up seconds: of a new server, of one that was measured before


@dataclass(frozen=True)
class Texts:
    """The samples that the archive answers: each as a request body, with its rows' lengths in tokens."""

    bodies: List[bytes]
    lengths: List[List[int]]
    content_type: str
    refused: List[Tuple[int, str]]  # the numbers, from 1, of refused samples, and why


@dataclass(frozen=True)
class Tuned:
    """The result; `chosen` is None if nothing reached the goal, and `best` is then the nearest."""

    trials: List[Trial]
    best: Trial
    chosen: Optional[Serving]
    own: Serving  # the archive's earlier configuration
    wastes: List[Waste]
    texts: Texts
    seconds: float
    in_time: bool  # whether everything was tried


def tune(
    archive: Path, samples_file: Path, goal: Goal, budget: float, progress: Progress, engine: str = TORCHSERVE
) -> Tuned:
    """Measure candidates for `budget` seconds; the archive itself is unchanged. Raises TraceserveError."""
    transfers.require_libcurl()
    manifest, own = read_manifest(archive), read_serving(archive)
    started = time.monotonic()

    def tell(what: str) -> None:
        progress(what, min(int(time.monotonic() - started), int(budget)), int(budget))

    tell("reading the samples")
    task, texts = _read(archive, manifest, samples_file)
    any_length = manifest.shapes.lengths is None and manifest.shapes.padded and not task.loop
    plain = replace(own, workers=None, threads=None)  # the archive's may be another machine's, and not even start here
    turned = settings_to_try(
        processor.cores(), goal.connections, manifest.max_length if any_length else 1, own.batch_size
    )
    with Servers(archive, texts, budget, tell, engine) as servers:
        search = ServingSearch(servers, goal, turned, budget - (time.monotonic() - started))
        best = search.run([own] if plain == own else [own, plain])
    if best.failure:
        raise ServerError(f"{archive} failed while it was measured: {best.failure}")
    tell("measuring what runs cost")
    wasted = wastes(
        texts.lengths,
        manifest.max_length,
        best.serving.batch_size,
        best.serving.length_step,
        _cost(archive, best.serving),
        task.most_tokens,
    )
    chosen = best.serving if search.reaches(best) else None
    return Tuned(
        list(search.trials.values()), best, chosen, own, wasted, texts, time.monotonic() - started, search.in_time
    )


class Servers:
    """An engine on one archive, an instance per candidate in a race; all are stopped at the end."""

    def __init__(
        self, archive: Path, texts: Texts, budget: float, tell: Callable[[str], None], engine: str = TORCHSERVE
    ) -> None:
        self.archive, self.texts, self.budget, self.tell, self.engine = archive, texts, budget, tell, engine
        self.seconds = min(_LONGEST, max(_SHORTEST, budget / 120))
        self.timeout = 300.0  # for a server's start
        self._running: Dict[Serving, Instance] = {}
        self._measured = False

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *exception: object) -> None:
        for serving in list(self._running):
            self.close(serving)

    def measure(self, serving: Serving, connections: int, seed: int) -> Result:
        """Measure for some seconds; starts a server if needed. Raises ServerError."""
        what = f"{describe_serving(serving)}, {connections} connections"
        cold = serving not in self._running
        if cold:
            self._start(serving, what)
        instance = self._running[serving]
        result = self._load(instance, connections, seed, _COLD if cold else _WARM, what)
        if not self._measured and 0 < result.requests < _ENOUGH and not result.errors:
            # A slow model needs longer measurements.
            self.seconds = min(self.budget / 20, self.seconds * _ENOUGH / result.requests)
        self._measured = True
        return result

    def close(self, serving: Serving) -> None:
        """Stop the candidate's server, if any."""
        instance = self._running.pop(serving, None)
        if instance is not None:
            instances.stop(instance, at_once=True)

    def _start(self, serving: Serving, what: str) -> None:
        self.tell(f"starting {what}")
        started = time.monotonic()
        port = configuration.free_ports(1)[0]
        self._running[serving] = server.start(
            [self.archive], port=port, timeout=self.timeout, serving=serving, engine=self.engine
        )
        if not self._measured:  # none of the others may take much longer
            self.timeout = max(30.0, 10 * (time.monotonic() - started))

    def _load(self, instance: Instance, connections: int, seed: int, warm_up: float, what: str) -> Result:
        target = Endpoint(instance.predictions_url(self.archive.stem))
        return load_generator.send_load(
            target,
            self.texts.bodies,
            self.texts.content_type,
            connections=connections,
            seconds=self.seconds,
            warm_up=warm_up,
            seed=seed,
            progress=lambda share: self.tell(f"measuring {what}"),
        )


def describe_serving(serving: Serving) -> str:
    """Describe a configuration."""
    workers, threads, step = serving.workers or configuration.DEFAULT_WORKERS, serving.threads, serving.length_step
    return ", ".join(
        (
            f"{workers} worker{'s' if workers > 1 else ''}",
            *([f"{threads} thread{'s' if threads > 1 else ''} each"] if threads else []),
            f"batch size {serving.batch_size}",
            f"batch delay {serving.max_batch_delay} ms",
            *([f"length step {step}"] if step else []),
        )
    )


def missed(best: Trial, goal: Goal, archive: Path) -> str:
    """Describe that nothing reached the p99, and the nearest result."""
    assert goal.p99 is not None
    connections = "1 connection" if best.connections == 1 else f"{best.connections} connections"
    return (
        f"no configuration that was measured answers with a p99 of {1000 * goal.p99:g} ms or less; the best was "
        f"{1000 * best.percentile(99):.1f} ms, with {connections} ({describe_serving(best.serving)}). {archive} stays as it was; "
        "a longer --budget tries more"
    )


def _read(archive: Path, manifest: Manifest, file: Path) -> Tuple[Task, Texts]:
    """Read the samples, tokenized like the archive; raises ConfigError if it answers none."""
    traffic = targets.traffic(OwnSamples.read(file))
    with scratch() as folder:
        unpack(archive, folder, [manifest.tokenizer.file])
        task = load_task(folder, manifest)
    texts = Texts([], [], traffic.content_type, [])
    for number, body in enumerate(traffic.bodies, 1):
        try:
            texts.lengths.append(_lengths(task, body, traffic.content_type))
            texts.bodies.append(body)
        except TraceserveError as error:
            texts.refused.append((number, error.message))
    if not texts.bodies:
        number, reason = texts.refused[0]
        raise ConfigError(f"the archive refuses every text of --samples {file}; number {number}: {reason}")
    return task, texts


def _cost(archive: Path, serving: Serving) -> CostModel:
    """Return the cost of the model's runs on this machine, as its worker measures it."""
    with scratch() as folder:
        unpack(archive, folder)
        engine = Engine.load(folder, settings=settings.read(yaml.safe_load(serving.to_yaml())))
        engine.warm_up()
        engine.scheduler.measure()
        return engine.scheduler.cost


def _lengths(task: Task, body: bytes, content_type: str) -> List[int]:
    """Return the lengths of a body's rows; raises TraceserveError if the archive would."""
    most = task.manifest.max_rows
    lengths: List[int] = []
    for item in task.encode(parse_requests({"body": body}, Headers(content_type), type(task), 0, most).requests):
        if not isinstance(item, Encoded):
            raise item
        lengths += [row.length for row in item.rows]
    refused = task.tokenizer.limits.of_rows(len(lengths), sum(lengths))
    if refused is not None:
        raise refused
    return lengths
