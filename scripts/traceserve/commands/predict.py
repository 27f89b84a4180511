"""predict: ask a running server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Iterator

from traceserve_runtime.errors import TraceserveError

from traceserve.commands.arguments import add_port, add_request, given_inputs, with_parameters
from traceserve.commands.contract import Command
from traceserve.commands.printing import printable, printable_json
from traceserve.errors import unread_reason


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the archive's name")
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="texts to ask; - reads them from standard input, one per line"
    )
    parser.add_argument("--file", type=Path, metavar="FILE", help="texts, one per line; or a body, in a .json file")
    add_request(
        parser,
        'the request\'s parameters, such as \'{"top_k": 3}\'; see `traceserve tasks`. With "stream": true the text is '
        "printed as it is written",
        "--json",
    )
    add_port(parser, text="[of the only server of NAME]")


def _predict(options: argparse.Namespace) -> int:
    """Print one answer per text, as a line of JSON."""
    from traceserve.serving import client, instances

    bodies = [with_parameters(options, inputs) for inputs in _inputs(options)]
    instance = instances.serving_instance(options.name, options.port)
    for body in bodies:
        if _is_streamed(body):
            for piece in client.stream(instance.address, options.name, body):
                print(printable(piece), end="", flush=True)
            print()
            continue
        answer = client.predict(instance.address, options.name, body)
        asked = body["inputs"] if isinstance(body, dict) and "inputs" in body else body
        for item in answer if isinstance(asked, list) and isinstance(answer, list) else [answer]:
            print(printable_json(item), flush=True)
    return 0


def _is_streamed(body: object) -> bool:
    """Return whether the answer of a body of our own protocol comes in pieces."""
    parameters = body.get("parameters") if isinstance(body, dict) else None
    return isinstance(parameters, dict) and parameters.get("stream") is True


def _inputs(options: argparse.Namespace) -> Iterator[object]:
    """Yield the inputs in the options; texts of a file are grouped in lists."""
    if sum((bool(options.texts), options.body is not None, options.file is not None)) != 1:
        raise TraceserveError("predict: give texts, or --body JSON, or --file FILE, or - for standard input")
    if options.file is None and options.texts != ["-"]:
        yield given_inputs(options)
        return
    if options.file is None and sys.stdin is None:
        raise TraceserveError("predict: standard input is closed")
    try:
        content = options.file.read_text(encoding="utf-8") if options.file else sys.stdin.read()
        content = content.lstrip("\ufeff")  # a byte order mark is no part of the first text
        if options.file and options.file.suffix == ".json":
            yield json.loads(content)
            return
    except (OSError, ValueError, RecursionError) as error:
        raise TraceserveError(f"predict: {options.file or 'standard input'}: {unread_reason(error)}") from None
    # not splitlines: a text may contain U+2028
    lines = content.split("\n")
    for number, line in enumerate(lines, 1):
        if any(
            "\udc80" <= character <= "\udcff" for character in line
        ):  # bytes of another encoding, from standard input
            raise TraceserveError(f"predict: standard input, line {number}, is not UTF-8")
    texts = [line.rstrip("\r") for line in lines if line.strip()]
    if options.file and not texts:
        raise TraceserveError(f"predict: {options.file} holds no text")
    yield from (texts[i : i + 32] for i in range(0, len(texts), 32))


COMMANDS = (
    Command(
        "predict",
        "Ask a running server.\n\nPrints one answer, as JSON, for each text:\n\n"
        '  traceserve predict NAME "some text" "another"\n  traceserve predict NAME --body \'{"inputs": "some text", '
        '"parameters": {"top_k": 3}}\'\n  cat texts.txt | traceserve predict NAME -',
        _add_predict,
        _predict,
        finds_servers=True,
    ),
)
