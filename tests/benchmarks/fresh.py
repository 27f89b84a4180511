"""Runs a function in a fresh process: an old one's threads and library caches would disturb the next measurement."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Callable, TypeVar

from traceserve_hosts import libraries

Result = TypeVar("Result")


def run(function: Callable[..., Result], *arguments: Any) -> Result:
    """Return a function's result from a new process with a worker's library settings."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _settle) as pool:
        return pool.submit(function, *arguments).result()


def _settle() -> None:
    libraries.set_defaults()  # torch is not imported yet
