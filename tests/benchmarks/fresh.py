"""A process that has not run a model: its threads and what libraries keep would be in the way of what is measured next."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Callable, TypeVar

from traceserve.machine import environment

Result = TypeVar("Result")


def run(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function gives in a new process, which has a worker's settings of the libraries."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _settle) as pool:
        return pool.submit(function, *arguments).result()


def _settle() -> None:
    os.environ.update(environment.settings())  # torch is not imported yet
