"""The command: `PYTHONPATH=handlers:scripts:tests python -m gpu --output DIR`, within eight minutes on an H100.

Needs torch, transformers, tokenizers and the builder's packages (pydantic, rich, pyyaml); no network. Without a GPU, or
with
--rehearse, the same code runs on the CPU with models of a few layers. The exit code is 1 if an answer is wrong.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Archives are built in parallel: spinning threads would take the cores from one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import datetime
import faulthandler
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

import torch
import transformers
from traceserve_runtime import processor

from gpu import answers, checkpoints, sharing, speed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a folder for report.json and report.md")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small models and few archives")
    parser.add_argument("--seconds", type=float, default=460, help="leave out, and list, what does not fit")
    parser.add_argument("--processes", type=int, default=12, help="archives built in parallel")
    options = parser.parse_args()
    rehearse = options.rehearse or not torch.cuda.is_available()
    device = "cpu" if rehearse else "cuda:0"
    faulthandler.dump_traceback_later(options.seconds + 30, exit=True)  # earlier results are on disk
    report = _Report(options.output, options.seconds, device)
    with tempfile.TemporaryDirectory(prefix="traceserve-gpu-") as folder:
        report.part(
            "answers",
            lambda: _answers(report, device, Path(folder), rehearse, options.processes, 0.4 * options.seconds),
        )
        report.part("two workers", lambda: _share(report, device, Path(folder), rehearse))
        for name, dtype in (
            ("bert-base", "float16"),
            ("llama-135m", "float16"),
            ("bert-base", "bfloat16"),
            ("bert-base", "float32"),
        ):
            dtype = "float32" if rehearse else dtype
            if rehearse and any(one["model"] == name for one in report.content["speeds"]):
                continue
            compiled = dtype == "float16"
            act = partial(_speed, report, name, device, dtype, Path(folder), compiled)
            report.part(f"speed of {name} in {dtype}", act)
    return report.finish()


class _Report:
    """The results so far, on disk after each part: the machine may be taken away."""

    def __init__(self, folder: Path, seconds: float, device: str) -> None:
        self._folder = folder
        self._began = time.monotonic()
        self._seconds = seconds
        self.content: Dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name(0) if device != "cpu" else processor.name(),
            "cores": processor.cores(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
            "outcomes": [],
            "workers": None,
            "speeds": [],
            "peak": {},
            "failures": [],
            "left_out": [],
            "seconds": {},
        }
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Return the seconds until the end."""
        return self._seconds - (time.monotonic() - self._began)

    def part(self, name: str, act: Any) -> None:
        """Run one part; its exceptions become failures in the report, and the next part follows."""
        if self.left() < 20:
            self.content["left_out"].append(name)
            return
        began = time.monotonic()
        try:
            act()
        except Exception:
            self.content["failures"].append(f"{name}: {traceback.format_exc(limit=-4)}")
        self.content["seconds"][name] = round(time.monotonic() - began, 1)
        print(f"{name}: {self.content['seconds'][name]} s", flush=True)
        self.write()

    def finish(self) -> int:
        self.write()
        print(_markdown(self.content))
        return int(bool(self.content["failures"]))

    def write(self) -> None:
        (self._folder / "report.json").write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        (self._folder / "report.md").write_text(_markdown(self.content), encoding="utf-8")


def _answers(report: _Report, device: str, folder: Path, few: bool, processes: int, seconds: float) -> None:
    """Report each archive once it was queried; name those that are not ready in time."""
    jobs = answers.jobs(device, folder, few)
    waiting = {job: f"{job.architecture} {job.task} {job.save_mode}" for job in jobs}
    spawn = multiprocessing.get_context("spawn")
    until = time.monotonic() + seconds
    with spawn.Pool(min(processes, len(jobs)), torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        results = pool.imap_unordered(answers.run, jobs)
        for _ in jobs:
            try:
                job, found = results.next(max(0.0, until - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
            waiting.pop(job)
            report.content["outcomes"] += [{**outcome._asdict(), "passed": outcome.passed} for outcome in found]
            report.content["failures"] += answers.failures(found)
            report.write()
    report.content["left_out"] += waiting.values()


def _share(report: _Report, device: str, folder: Path, small: bool) -> None:
    dtype = "float32" if device == "cpu" else "float16"
    _, artifact = speed.prepared("bert-base", folder, dtype, small)
    texts = checkpoints.texts(speed.lengths(64, 60), checkpoints.vocabulary("bert-base", small))
    alone, two = sharing.beside_each_other(artifact, device, texts, 2 if small else 100)
    labels = [[json.loads(answer)["label"] for answer in worked.answers] for worked in (alone, *two)]
    report.content["workers"] = {
        "dtype": dtype,
        "devices": [worked.device for worked in (alone, *two)],
        "megabytes": [round(worked.megabytes) for worked in (alone, *two)],
        "seconds_alone": alone.seconds,
        "seconds_beside": [worked.seconds for worked in two],
        "labels_alike": labels[0] == labels[1] == labels[2],
    }
    if labels[0] != labels[1] or labels[0] != labels[2] or any(worked.device != device for worked in two):
        report.content["failures"].append(
            "two workers: their answers differed from one worker's, or were not computed on the device"
        )


def _speed(report: _Report, name: str, device: str, dtype: str, folder: Path, compiled: bool) -> None:
    peak = speed.peak(device, dtype)
    if peak is not None:
        report.content["peak"][dtype] = peak
    for found in speed.measure(name, folder, device, dtype, device == "cpu", compiled, report.left):
        report.content["speeds"].append(found._asdict())
        report.write()


def _markdown(content: Dict[str, Any]) -> str:
    lines = [
        f"{content['device']}, {content['cores']} cores, torch {content['torch']}, transformers {content['transformers']}, "
        f"Python {content['python']}, {content['date']}",
        "",
        "| archive | dtype | gate: largest difference | compared on | answers changed | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for item in content["outcomes"]:
        gate = item["gate"]
        largest = gate.get("largest_difference")
        devices = sorted({str(each.get("device")) for each in gate.get("variants", [])}) or ["cpu"]
        lines.append(
            f"| {item['what']} | {item['dtype']} | {'-' if largest is None else f'{largest:.1e}'} | {', '.join(devices)} "
            f"| {item['changed']} of {item['asked']} | {item['seconds']:.1f} |"
        )
    if content["workers"]:
        workers = content["workers"]
        beside = ", ".join(f"{seconds:.2f}" for seconds in workers["seconds_beside"])
        lines += [
            "",
            f"Two workers on one device ({workers['dtype']}): {workers['seconds_alone']:.2f} s alone, {beside} s beside each "
            f"other; {', '.join(map(str, workers['megabytes']))} MiB at most; labels alike: {workers['labels_alike']}",
        ]
    lines += ["", "| model | dtype | requests at once | way | tokens/s | spread |", "|---|---|---|---|---|---|"]
    for item in content["speeds"]:
        lines.append(
            f"| {item['model']} | {item['dtype']} | {item['batch']} | {item['what']} | {item['tokens_per_second']:,.0f} "
            f"| {100 * item['spread']:.0f} % |"
        )
    for dtype, peak in content["peak"].items():
        lines += ["", f"A product of two matrices of 8192 in {dtype}: {peak:.0f} TFLOP/s"]
    lines += [f"\nFailed: {failure}" for failure in content["failures"]]
    lines += [f"\nLeft out for lack of time: {name}" for name in content["left_out"]]
    parts: List[str] = [f"{name} {seconds} s" for name, seconds in content["seconds"].items()]
    return "\n".join([*lines, "", "Time: " + ", ".join(parts), ""])


if __name__ == "__main__":
    sys.exit(main())
