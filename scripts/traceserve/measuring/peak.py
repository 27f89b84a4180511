"""The peak of this machine: the floating-point operations per second of its products of matrices, measured."""

from __future__ import annotations

import time
from typing import Callable, List, Optional

import torch
from traceserve_runtime import processor
from traceserve_runtime.runtimes.team import threads_kept

from traceserve.building.config.hardware import HARDWARE
from traceserve.building.writers.tracing import torch_internals

_SIZES = (512, 1024, 2048)  # of square matrices; caches decide which is fastest
_SECONDS = 0.4  # for each size
_LARGEST = 127  # of int8


@threads_kept()
def measure_peak(dtype: str, hardware: str) -> Optional[float]:
    """Return this machine's operations per second in products of a dtype, on all of its cores or one GPU; None for other chips,
    and where torch has no such products. The fastest of several sizes and runs counts: others were disturbed.
    """
    device = HARDWARE[hardware].torch_device
    if device is None:
        return None
    torch.set_num_threads(processor.cores())
    try:
        found: List[float] = []
        for size in _SIZES:
            operations = 2 * size**3
            found.append(_fastest(_product(dtype, device, size), operations))
            if operations / found[-1] > _SECONDS:  # as where torch emulates the dtype
                break
        return max(found)
    except (RuntimeError, AttributeError, AssertionError):  # no such product, or no GPU
        return None


def _product(dtype: str, device: str, size: int) -> Callable[[], object]:
    kind: torch.dtype = getattr(torch, dtype)
    if kind.is_floating_point:
        one, other = (torch.rand(size, size, device=device).to(kind) for _ in range(2))
        return lambda: torch.mm(one, other)
    whole = [torch.randint(-_LARGEST, _LARGEST, (size, size), dtype=kind, device=device) for _ in range(2)]
    multiply = torch_internals.int8_product()
    return lambda: multiply(*whole)


def _fastest(run: Callable[[], object], operations: int) -> float:
    run()
    seconds: List[float] = []
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        _finish()
        started = time.perf_counter()
        run()
        _finish()
        seconds.append(time.perf_counter() - started)
    return operations / min(seconds)


def _finish() -> None:
    """Wait for a GPU, which only promises its results."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
