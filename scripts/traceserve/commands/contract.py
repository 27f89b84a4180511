"""What a command is."""

from __future__ import annotations

import argparse
from typing import Callable, NamedTuple


class Command(NamedTuple):
    """A command of `traceserve`. The first sentence of `text` stands in the list of all, the whole of it in its --help."""

    name: str
    text: str
    add: Callable[[argparse.ArgumentParser], None]  # its options
    run: Callable[[argparse.Namespace], int]  # gives the exit code
    finds_servers: bool = False  # it starts servers, or looks for those that run
