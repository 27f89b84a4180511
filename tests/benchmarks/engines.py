"""Ray Serve beside TorchServe: one archive, the same cores, measured in turn; and where the processor's time goes.

    python tests/benchmarks/engines.py --archive NAME.mar --texts FILE.csv --rounds 5 [--seconds 4]

Needs `traceserve[serve,ray,bench]`. Prints medians over the rounds: the latency's p50 at one connection, throughput and processor
time a request at 64, by processes. The load generator's own time is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import psutil
import tables
from traceserve.building.samples import OwnSamples
from traceserve.measuring.load_generator import Endpoint, Result, send_load
from traceserve.measuring.targets import traffic
from traceserve.serving import configuration, instances, server
from traceserve.serving.engines import RAY, TORCHSERVE
from traceserve.serving.instances import Instance

MANY = 64
_KINDS = (  # a process's command line, and what it is
    (re.compile(r"ray::ServeReplica"), "replica or worker"),
    (re.compile(r".*model_service_worker"), "replica or worker"),
    (re.compile(r"(\S*/)?haproxy "), "HAProxy or JVM"),
    (re.compile(r"\S*java "), "HAProxy or JVM"),
)


def main() -> None:
    options = parsed()
    bodies = traffic(OwnSamples.read(options.texts))
    rounds: List[Dict[str, Dict[str, float]]] = []
    with served(options.archive, TORCHSERVE) as one, served(options.archive, RAY) as other:
        both = {TORCHSERVE: one, RAY: other}
        for turn in range(options.rounds):
            found: Dict[str, Dict[str, float]] = {}
            for engine in sorted(both, reverse=turn % 2 == 1):
                found[engine] = measured(both[engine], bodies.bodies, bodies.content_type, options.seconds)
            rounds.append(found)
    tables.show(rows(rounds), markdown=False)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    return parser.parse_args()


@contextlib.contextmanager
def served(archive: Path, engine: str) -> Iterator[Instance]:
    instance = server.start([archive], port=configuration.free_ports(1)[0], workers=1, engine=engine)
    try:
        yield instance
    finally:
        instances.stop(instance)


def measured(instance: Instance, bodies: Tuple[bytes, ...], content_type: str, seconds: float) -> Dict[str, float]:
    """Return one round's figures of an engine."""
    target = Endpoint(f"{instance.url}/predictions/{instance.names[0]}")

    def load(connections: int, span: float, warm_up: float) -> Result:
        return send_load(target, bodies, content_type, connections, seconds=span, warm_up=warm_up)

    alone = load(1, seconds, 1.0)
    load(MANY, 1.0, 0.0)
    before = processor_seconds(instance)
    many = load(MANY, seconds, 0.0)
    after = processor_seconds(instance)
    if alone.errors or many.errors:
        raise RuntimeError(f"{instance.engine}: {alone.errors} {many.errors}")
    spent = {f"CPU ms a request, {kind}": 1000 * (after[kind] - before[kind]) / many.requests for kind in sorted(after)}
    whole = 1000 * (sum(after.values()) - sum(before.values())) / many.requests
    return {
        "p50 in ms, 1 connection": 1000 * alone.percentile(50),
        f"requests/s, {MANY} connections": many.throughput,
        f"CPU ms a request, {MANY} connections": whole,
        **spent,
    }


def processor_seconds(instance: Instance) -> Dict[str, float]:
    """Return the processor time so far of an engine's processes, by kind."""
    found: Dict[str, float] = defaultdict(float)
    process = instance.process
    assert process is not None
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            command = " ".join(each.cmdline())
            kind = next(
                (name for pattern, name in _KINDS if pattern.match(command) or pattern.search(command)), "the rest"
            )
            times = each.cpu_times()
            found[kind] += times.user + times.system
    return found


def rows(rounds: List[Dict[str, Dict[str, float]]]) -> List[tables.Row]:
    """Return medians over the rounds; the ratio is the median of each round's."""
    found: List[tables.Row] = []
    for name in rounds[0][RAY]:
        values = {engine: [each[engine].get(name, 0.0) for each in rounds] for engine in (TORCHSERVE, RAY)}
        ratios = [ray / torch for torch, ray in zip(values[TORCHSERVE], values[RAY]) if torch]
        found.append(
            {
                "": name,
                "TorchServe": tables.figure(tables.median(values[TORCHSERVE])),
                "Ray Serve": tables.figure(tables.median(values[RAY])),
                "ratio": tables.figure(tables.median(ratios)) if ratios else "",
            }
        )
    return found


if __name__ == "__main__":
    main()
