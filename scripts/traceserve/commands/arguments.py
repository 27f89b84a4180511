"""Options and types that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Optional, Tuple

from traceserve_runtime.errors import TraceserveError


def add_port(
    parser: argparse.ArgumentParser, default: Optional[int] = None, text: str = "[of the only server]"
) -> None:
    """Add `--port`; `text` says what it is without a default."""
    text = f"[{default}]" if default else text
    parser.add_argument(
        "--port", type=port, default=default, metavar="P", help=f"the port of the REST interface {text}"
    )


def add_signature(parser: argparse.ArgumentParser, text: str = "") -> None:
    """Add `--require-signature`; `text` says more."""
    parser.add_argument(
        "--require-signature",
        type=Path,
        metavar="PUBLIC_KEY",
        help="refuse an archive unless NAME.mar.sig beside it is its signature by this key (PEM; certificates of an authority "
        f"too), which `traceserve sign` writes{text}",
    )


def add_nothing(parser: argparse.ArgumentParser) -> None:
    """Add nothing, for a command without options."""


def require_folders(*files: Optional[Path]) -> None:
    """Raise TraceserveError unless the folders of these files exist: before hours are measured."""
    for path in filter(None, files):
        if not path.resolve().parent.is_dir():
            raise TraceserveError(f"there is no folder {path.parent} for {path}")


def positive(text: str) -> int:
    """Parse a whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("should be 1 or more")
    return number


def zero_or_more(text: str) -> int:
    """Parse a whole number of 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("should be 0 or more")
    return number


def port(text: str) -> int:
    """Parse a TCP port."""
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError("should be 1 to 65535")
    return number


def shares(text: str) -> Tuple[float, ...]:
    """Parse numbers above 0, separated by commas."""
    numbers = tuple(float(part) for part in text.split(","))
    if not all(0 < number < float("inf") for number in numbers):
        raise argparse.ArgumentTypeError("should be numbers above 0, as 9,1")
    return numbers
