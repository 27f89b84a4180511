"""Two workers on one GPU, as started by TorchServe: separate processes, each through the handler."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple


class Worked(NamedTuple):
    """One worker's answers, as bytes; its batches' seconds; its tensors' peak memory on the device in MiB."""

    answers: List[bytes]
    seconds: float
    megabytes: float
    device: str


class Context:
    """The parts of TorchServe's context that a handler reads."""

    def __init__(self, folder: Path, device: str) -> None:
        self.system_properties: Dict[str, Any] = {"model_dir": str(folder)}
        if device.startswith("cuda"):
            self.system_properties["gpu_id"] = int(device.split(":")[1])
        self.manifest: Dict[str, Any] = {}
        self.metrics = None

    def get_all_request_header(self, index: int) -> Dict[str, str]:
        return {"content-type": "application/json"}

    def get_request_id(self, index: int) -> str:
        return str(index)

    def set_response_header(self, index: int, key: str, value: str) -> None:
        """Ignore it."""

    def set_response_status(self, status: int, phrase: str, index: int) -> None:
        raise AssertionError(f"request {index} was answered with {status} {phrase}")


def work(folder: str, device: str, texts: Sequence[str], batches: int) -> Worked:
    """Load the archive's folder like a worker, and answer the same batch repeatedly."""
    import torch
    from transformer_handler import TransformerHandler

    context = Context(Path(folder), device)
    handler = TransformerHandler()
    handler.initialize(context)
    rows = [{"body": json.dumps({"text": text}).encode()} for text in texts]
    answers: List[bytes] = handler.handle(rows, context)
    began = time.perf_counter()
    for _ in range(batches):
        again = handler.handle(rows, context)
        if [json.loads(one)["label"] for one in again] != [json.loads(one)["label"] for one in answers]:
            raise AssertionError("the same texts got different answers")
    seconds = time.perf_counter() - began
    on_gpu = device.startswith("cuda")
    megabytes = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0
    assert handler.engine is not None
    return Worked(answers, seconds, megabytes, str(getattr(handler.engine.runner, "_device", "")))


def beside_each_other(folder: Path, device: str, texts: Sequence[str], batches: int) -> Tuple[Worked, List[Worked]]:
    """Run one worker alone, and two at the same time; each in its own process."""
    arguments = (str(folder), device, list(texts), batches)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        alone = pool.submit(work, *arguments).result()
    with ProcessPoolExecutor(2, spawn) as pool:
        running = [pool.submit(work, *arguments) for _ in range(2)]
        return alone, [each.result() for each in running]
