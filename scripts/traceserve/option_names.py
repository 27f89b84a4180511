"""How an error names an option: as the commands have it, or as the Python API's argument."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Iterator

_as_arguments: ContextVar[bool] = ContextVar("as_arguments", default=False)


@contextlib.contextmanager
def named_as_arguments() -> Iterator[None]:
    """Let errors name options as arguments: their reader calls a function, and gives none."""
    token = _as_arguments.set(True)
    try:
        yield
    finally:
        _as_arguments.reset(token)


def option(name: str, value: str = "") -> str:
    """Return the name of an option with a value, which only a command's reader needs: `--samples FILE`, or `samples`."""
    if _as_arguments.get():
        return name.replace("-", "_")
    return f"--{name} {value}" if value else f"--{name}"


def switch(name: str) -> str:
    """Return the name of an option without a value, switched on: `--keep-samples`, or `keep_samples=True`."""
    return f"{option(name)}=True" if _as_arguments.get() else option(name)
