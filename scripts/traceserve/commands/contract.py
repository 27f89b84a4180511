"""The contract of a command."""

from __future__ import annotations

import argparse
from typing import Callable, NamedTuple


class Command(NamedTuple):
    """A command of `traceserve`. The list of commands shows the first sentence of `text`, its --help the whole."""

    name: str
    text: str
    add: Callable[[argparse.ArgumentParser], None]  # adds its options
    run: Callable[[argparse.Namespace], int]  # returns the exit code
    finds_servers: bool = False  # whether it starts or finds servers
    trouble: int = 1  # the exit code of a reported error; 2 where 1 says that something was found
