"""`traceserve update` under load: requests that fail, or are answered wrongly, while two archives take each other's place.

    python tests/benchmarks/update_under_load.py OLD.mar NEW.mar --samples texts.txt [--engine ray] [--without-drain]

In each round the second archive takes the first one's place, and the first one its again. Both give the same answers; an
answer that differs from the first one to the same request is an error. `--without-drain` shows what the drain is for.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections import Counter
from pathlib import Path
from typing import List, Optional

from traceserve.building.samples import OwnSamples
from traceserve.measuring.answers import Consistency
from traceserve.measuring.load_generator import Endpoint, Result, send_load
from traceserve.rollout import draining
from traceserve.rollout.updating import UpdateOptions, update_server
from traceserve.serving import configuration, engines, instances, server

_SPAN = 2.0  # seconds; the load is sent in spans, so that it ends soon after the updates


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs=2, type=Path)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-drain", action="store_true", help="TorchServe alone")
    parser.add_argument("--engine", default=engines.TORCHSERVE, choices=engines.NAMES)
    options = parser.parse_args(arguments)
    bodies = [json.dumps({"text": text}).encode() for _, text in OwnSamples.read(options.samples).lines]
    if options.without_drain:
        draining.drain = lambda *arguments: 0
    port = configuration.free_ports(1)[0]
    name = options.archives[0].stem
    instance = server.start([options.archives[0]], port=port, workers=options.workers, engine=options.engine)
    try:
        for number in range(1, options.rounds + 1):
            results: List[Result] = []
            ended, same = threading.Event(), Consistency()

            def send(results: List[Result] = results, ended: threading.Event = ended, same: Consistency = same) -> None:
                target = Endpoint(f"{instance.url}/predictions/{name}")
                while not ended.is_set():
                    results.append(
                        send_load(
                            target,
                            bodies,
                            connections=options.connections,
                            seconds=_SPAN,
                            warm_up=0,
                            check=same,
                            timeout=20,
                        )
                    )

            thread = threading.Thread(target=send)
            thread.start()
            seconds = [
                update_server(path, port, UpdateOptions(workers=options.workers)).seconds
                for path in reversed(options.archives)
            ]
            ended.set()
            thread.join()
            errors: Counter[str] = Counter()
            for result in results:
                errors.update(result.errors)
            latencies = sorted(latency for result in results for latency in result.latencies)
            p50, p99 = (latencies[int(len(latencies) * share)] * 1000 for share in (0.5, 0.99))
            failed = f"{sum(errors.values())} failed {dict(errors) or ''}".rstrip()
            print(
                f"round {number}: {len(latencies):,} answered, {failed}, p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest "
                f"{latencies[-1] * 1000:.0f} ms; updates took {seconds[0]:.1f} and {seconds[1]:.1f} s",
                flush=True,
            )
    finally:
        instances.stop(instances.find_instance(port))


if __name__ == "__main__":
    main()
