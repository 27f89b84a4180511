"""The pictures of docs/pictures, made on this machine: `python tests/pictures.py [NAME ...]`.

  build     the table that a build prints
  bench     the page of `traceserve bench --html`
  tune      the page of `traceserve tune --html`
  lengths   texts per second by length, beside transformers' pipeline
  request   a flame graph of the worker under load (needs py-spy, and the right to look into another process)

The demo's archive is built for them. The pages are seen by a headless Chromium, through Playwright.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List

import psutil
from browsing import launched
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"
NAME, CONFIG = "support-intents", "setup_config.json"
SAMPLES = str(ROOT / "artifacts" / "demo" / "intents.csv")
LENGTHS = (8, 16, 32, 64, 96, 128)
ROUNDS = 5
TEXTS = 32


class Workshop:
    """A folder with the demo's archive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copyfile(ROOT / CONFIG, folder / CONFIG)
        self.printed = self.run("build")
        self.archive = f"model_store/{NAME}.mar"

    def run(self, *arguments: str) -> str:
        """Run `traceserve`; returns what a terminal would show."""
        terminal = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm-256color"}
        command = [sys.executable, "-m", "traceserve", *arguments]
        ran = subprocess.run(command, cwd=self.folder, env=terminal, capture_output=True, text=True)
        if ran.returncode:
            print(ran.stderr[-2000:], file=sys.stderr)
            ran.check_returncode()
        return ran.stdout


def build(workshop: Workshop) -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print("[bold]$[/] traceserve build")
    console.print(Text.from_ansi(workshop.printed.rstrip()), highlight=False)
    drawn = console.export_svg(title="traceserve build")
    # Fonts of another host, which a picture in a page may not load.
    (FOLDER / "build.svg").write_text(re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL), encoding="utf-8")


def bench(workshop: Workshop) -> None:
    workshop.run("serve", workshop.archive)
    try:
        options = ("--samples", SAMPLES, "--connections", "1,4,16,64", "--seconds", "5", "--html", "bench.html")
        workshop.run("bench", NAME, *options)
    finally:
        workshop.run("stop")
    _seen(workshop.folder / "bench.html", FOLDER / "bench.png")


def tune(workshop: Workshop) -> None:
    workshop.run("tune", workshop.archive, "--samples", SAMPLES, "--dry-run", "--budget", "150", "--html", "tune.html")
    _seen(workshop.folder / "tune.html", FOLDER / "tune.png")


def lengths(workshop: Workshop) -> None:
    import plotly.graph_objects as go
    import transformers
    from traceserve.archives.contents import unpack
    from traceserve.building.checkpoints.demo import train_demo
    from traceserve.measuring.page import html_document
    from traceserve_runtime.engine import Engine
    from traceserve_runtime.tasks.contract import Request

    unpacked = workshop.folder / "unpacked"
    unpack(workshop.folder / workshop.archive, unpacked)
    engine = Engine.load(unpacked)
    engine.warm_up()
    engine.scheduler.measure()
    checkpoint = str(train_demo(NAME).folder)
    pipeline = transformers.pipeline("text-classification", model=checkpoint, device="cpu")
    most = {"padding": "max_length", "truncation": True, "max_length": engine.manifest.max_length}
    ways: Dict[str, Callable[[List[str]], object]] = {
        f"traceserve, {engine.manifest.dtype}": lambda texts: engine.answer(
            [Request({"text": text}) for text in texts]
        ),
        "transformers' pipeline": lambda texts: pipeline(texts, batch_size=TEXTS),
        f"the pipeline, padded to {most['max_length']}": lambda texts: pipeline(texts, batch_size=TEXTS, **most),
    }
    figure = go.Figure()
    speeds: Dict[str, List[float]] = {name: [] for name in ways}
    for length in LENGTHS:
        texts = ["word " * (length - 2 - i % 2) for i in range(TEXTS)]
        seconds: Dict[str, List[float]] = {name: [] for name in ways}
        for _ in range(1 + ROUNDS):
            for name, answer in ways.items():
                began = time.perf_counter()
                answer(texts)
                seconds[name].append(time.perf_counter() - began)
        for name, values in seconds.items():
            speeds[name].append(TEXTS / statistics.median(values[1:]))
    for name, values in speeds.items():
        figure.add_scatter(x=LENGTHS, y=values, name=name, mode="lines+markers")
        print(name, *(f"{value:.0f}" for value in values))
    figure.update_xaxes(type="log", title="tokens of a text", tickvals=LENGTHS, ticktext=[str(n) for n in LENGTHS])
    figure.update_yaxes(type="log", title="texts/s, 32 at a time", dtick="D1")
    page = workshop.folder / "lengths.html"
    page.write_text(html_document("Texts per second, by their length", [], [figure]), encoding="utf-8")
    _seen(page, FOLDER / "lengths.png", height=680)


def request(workshop: Workshop) -> None:
    workshop.run("serve", workshop.archive)
    try:
        (worker,) = [
            p for p in psutil.process_iter(["cmdline"]) if "model_service_worker.py" in " ".join(p.info["cmdline"])
        ]
        record = [
            "py-spy",
            "record",
            "--pid",
            str(worker.pid),
            "--duration",
            "12",
            "--rate",
            "200",
            "--format",
            "flamegraph",
        ]
        spying = subprocess.Popen([*record, "--output", str(FOLDER / "request.svg")], stdout=subprocess.DEVNULL)
        workshop.run("bench", NAME, "--samples", SAMPLES, "--connections", "16", "--seconds", "12")
        assert spying.wait(60) == 0
        drawn = FOLDER / "request.svg"
        titled = re.sub(
            r"py-spy record .*?(?=</text>)", "a worker under 16 connections", drawn.read_text(encoding="utf-8")
        )
        drawn.write_text(titled, encoding="utf-8")
    finally:
        workshop.run("stop")


PICTURES: Dict[str, Callable[[Workshop], None]] = {
    "build": build,
    "bench": bench,
    "tune": tune,
    "lengths": lengths,
    "request": request,
}


def _seen(page: Path, file: Path, height: int = 900) -> None:
    """Write what a browser shows at the top of a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = launched(driver)
        view = browser.new_context(viewport={"width": 1180, "height": height}, color_scheme="light").new_page()
        view.goto(page.as_uri())
        view.wait_for_timeout(1500)
        view.screenshot(path=str(file))
        browser.close()


def main() -> None:
    """Make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)} [all]")
    names: List[str] = parser.parse_args().names or list(PICTURES)
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        workshop = Workshop(Path(folder))
        for name in names:
            PICTURES[name](workshop)


if __name__ == "__main__":
    main()
