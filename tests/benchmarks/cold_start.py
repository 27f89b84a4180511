"""From a server's start to its first answer: ours, and any other archive under plain `torchserve`, alternating.

python tests/benchmarks/cold_start.py model_store/NAME.mar [--other OTHER.mar] [--rounds 5]
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List

import servers
import tables


def main() -> None:
    parser = tables.parser(__doc__, rounds=5)
    parser.add_argument("archive", type=Path, help="an archive of ours, for `traceserve serve`")
    parser.add_argument("--other", type=Path, metavar="MAR", help="an archive to serve by plain torchserve")
    options = parser.parse_args()
    starters: Dict[str, servers.Starter] = {"traceserve serve": lambda: servers.ours(options.archive)}
    if options.other:
        starters["torchserve, other archive"] = lambda: servers.foreign(options.other)
    seconds: Dict[str, List[float]] = {name: [] for name in starters}
    with tables.progress() as bar:
        task = bar.add_task("", total=options.rounds * len(starters))
        for _ in range(options.rounds):
            for name, starter in starters.items():
                bar.update(task, description=name)
                with starter() as server:
                    seconds[name].append(server.seconds)
                bar.advance(task)
    own = tables.median(seconds["traceserve serve"])
    tables.show(
        [
            {
                "": name,
                "median s": f"{tables.median(values):.2f}",
                "ours to it": f"{own / tables.median(values):.2f}",
                "all": " ".join(f"{value:.2f}" for value in values),
            }
            for name, values in seconds.items()
        ],
        options.markdown,
    )
    tables.save(options.json, seconds)


if __name__ == "__main__":
    main()
