"""From the start of a server to its first answer: ours, and any other archive under plain `torchserve`, in turn.

python tests/benchmarks/cold_start.py model_store/NAME.mar [--other OTHER.mar] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Dict, List

from rich.console import Console
from rich.progress import track
from rich.table import Table
from traceserve import torchserve

TEXT = b"I still have not received my new card, I ordered over a week ago."


def ours(archive: Path) -> float:
    """Seconds of `traceserve serve`, which returns at the first answer."""
    port = str(torchserve.free_ports(1)[0])
    command = [sys.executable, "-m", "traceserve"]
    started = time.monotonic()
    subprocess.run(
        [*command, "serve", str(archive), "--port", port],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.monotonic() - started
    subprocess.run([*command, "stop", "--port", port], check=True, stdout=subprocess.DEVNULL)
    return seconds


def other(archive: Path) -> float:
    """Seconds from `torchserve --start` with one worker and its own defaults to the first 200."""
    with tempfile.TemporaryDirectory(prefix="cold-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        shutil.copyfile(archive, folder / archive.name)
        ports = torchserve.free_ports(5)
        keys = ("inference_address", "management_address", "metrics_address")
        lines = [f"{key}=http://127.0.0.1:{port}" for key, port in zip(keys, ports)]
        lines += [f"grpc_inference_port={ports[3]}", f"grpc_management_port={ports[4]}", "default_workers_per_model=1"]
        (folder / "config.properties").write_text("\n".join(lines) + "\n")
        environment = {**os.environ, "TMPDIR": f"{folder}/tmp", "TEMP": f"{folder}/tmp", **torchserve.find_java()}
        command = [sys.executable, "-m", "ts.model_server"]
        options = [
            "--model-store",
            ".",
            "--models",
            f"{archive.stem}={archive.name}",
            "--ts-config",
            "config.properties",
        ]

        def run(*arguments: str) -> None:
            quiet: Dict[str, int] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, **quiet)

        started = time.monotonic()
        run("--start", "--disable-token-auth", "--ncs", *options)
        try:
            _first_answer(f"http://127.0.0.1:{ports[0]}/predictions/{archive.stem}")
            return time.monotonic() - started
        finally:
            run("--stop", "--foreground")


def _first_answer(url: str, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            request = urllib.request.Request(url, data=TEXT, headers={"Content-Type": "text/plain"})
            with urllib.request.urlopen(request, timeout=timeout) as response:
                response.read()
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
    raise TimeoutError(f"{url} gave no answer in {timeout} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--other", type=Path, help="an archive to serve by plain torchserve")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds: Dict[str, List[float]] = {"traceserve serve": []}
    if options.other:
        seconds["torchserve, other archive"] = []
    for _ in track(range(options.rounds), "rounds", console=Console(stderr=True)):
        seconds["traceserve serve"].append(ours(options.archive))
        if options.other:
            seconds["torchserve, other archive"].append(other(options.other.resolve()))
    table = Table("", "median s", "all")
    for name, values in seconds.items():
        table.add_row(name, f"{statistics.median(values):.2f}", " ".join(f"{value:.2f}" for value in values))
    Console().print(table)
    if options.other:
        ratio = statistics.median(seconds["traceserve serve"]) / statistics.median(seconds["torchserve, other archive"])
        print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
