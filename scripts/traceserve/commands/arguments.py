"""Options and types that several commands share."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any, Optional, Tuple

from traceserve_runtime.errors import TraceserveError

from traceserve.archives import staging
from traceserve.errors import ArchiveError


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


def add_samples(parser: argparse.ArgumentParser, what: str, more: str = "", required: bool = False) -> None:
    """Add `--samples`; `what` says what the texts are for, `more` what else is to be known of them."""
    kinds = "one per line, or a .csv or .tsv with a column text, or request bodies in a .jsonl"
    parser.add_argument("--samples", type=Path, required=required, metavar="FILE", help=f"{what} {kinds}{more}")


def add_nothing(parser: argparse.ArgumentParser) -> None:
    """Add nothing, for a command without options."""


def require_archive(path: Path) -> None:
    """Raise ArchiveError for an archive that does not exist, before a server of its name is looked for."""
    if not path.exists():
        raise ArchiveError(f"{path} does not exist; `traceserve build` makes it")


def require_no_folder(path: Path) -> None:
    """Raise TraceserveError for a folder where a file will be written."""
    if path.is_dir():
        raise TraceserveError(f"{path} is a folder; name a file, in it or elsewhere")


def require_writable(*files: Optional[Path]) -> None:
    """Raise TraceserveError unless these files can be written at the end: before hours are measured."""
    for path in filter(None, files):
        require_no_folder(path)
        staging.check_replaceable(path, True, TraceserveError)
        folder = path.resolve().parent
        if not folder.is_dir():
            raise TraceserveError(f"there is no folder {path.parent} for {path}")
        if path.exists() and not path.is_file():
            continue  # such as /dev/stdout, beside which nothing is written
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise TraceserveError(f"{path} cannot be written: {error.strerror}") from None


def add_request(parser: argparse.ArgumentParser, what: str, *also: str) -> None:
    """Add `--body`, also by other names, and `--parameters`; `what` says more of these."""
    parser.add_argument("--body", *also, dest="body", metavar="JSON", help="a request body as JSON, instead of texts")
    parser.add_argument("--parameters", metavar="JSON", help=what)


def given_inputs(options: argparse.Namespace) -> Any:  # noqa: ANN401 - any JSON
    """Return what `--body` or the texts ask, a single text alone; raises TraceserveError for what is no JSON."""
    if options.body is not None:
        return _parsed(options, "body")
    return options.texts[0] if len(options.texts) == 1 else options.texts


def with_parameters(options: argparse.Namespace, inputs: object) -> object:
    """Return the body of a request with `--parameters`, if they were given; raises TraceserveError for what is no JSON."""
    return inputs if options.parameters is None else {"inputs": inputs, "parameters": _parsed(options, "parameters")}


def _parsed(options: argparse.Namespace, option: str) -> Any:  # noqa: ANN401 - any JSON
    try:
        return json.loads(getattr(options, option))
    except (ValueError, RecursionError) as error:
        raise TraceserveError(f"{options.command.name}: --{option} should be JSON: {error}") from None


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


def number_in(text: str) -> float:
    """Parse a number; what is none gives NaN, which is in no range."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def duration(text: str) -> float:
    """Parse seconds, 0 or more."""
    number = number_in(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError("should be 0 or more")
    return number


def quantity(text: str) -> float:
    """Parse a number above 0."""
    number = duration(text)
    if not number:
        raise argparse.ArgumentTypeError("should be more than 0")
    return number


def port(text: str) -> int:
    """Parse a TCP port."""
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError("should be 1 to 65535")
    return number


def shares(text: str) -> Tuple[float, ...]:
    """Parse numbers above 0, separated by commas."""
    numbers = tuple(map(number_in, text.split(",")))
    if not all(0 < number < float("inf") for number in numbers):
        raise argparse.ArgumentTypeError("should be numbers above 0, as 9,1")
    return numbers
