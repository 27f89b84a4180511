"""predict: ask a running server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Iterator

from traceserve_runtime.errors import TraceserveError

from traceserve.commands.arguments import add_port
from traceserve.commands.contract import Command
from traceserve.commands.printing import printable_json


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the archive's name")
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="texts to ask; - reads them from standard input, one per line"
    )
    parser.add_argument("--json", metavar="BODY", help="a request body as JSON, instead of texts")
    parser.add_argument("--file", type=Path, metavar="FILE", help="texts, one per line; or a body, in a .json file")
    parser.add_argument(
        "--parameters",
        metavar="JSON",
        help='the request\'s parameters, such as \'{"top_k": 3}\'; see `traceserve tasks`. With "stream": true the text is '
        "printed as it is written",
    )
    add_port(parser)


def _predict(options: argparse.Namespace) -> int:
    """Print one answer per text, as a line of JSON."""
    from traceserve.errors import ServerError
    from traceserve.serving import client, instances

    bodies = list(_bodies(options))
    instance = instances.find_instance(options.port)
    if options.name not in instance.names:
        raise ServerError(f"the server on port {instance.port} has no {options.name}, but {', '.join(instance.names)}")
    for body in bodies:
        if isinstance(body, dict) and dict(body.get("parameters") or {}).get("stream") is True:
            for piece in client.stream(
                instance.url, options.name, body, instance.key, certificate=instance.certificate
            ):
                print(piece, end="", flush=True)
            print()
            continue
        answer = client.predict(instance.url, options.name, body, instance.key, certificate=instance.certificate)
        asked = body["inputs"] if isinstance(body, dict) and "inputs" in body else body
        for item in answer if isinstance(asked, list) else [answer]:
            print(printable_json(item), flush=True)
    return 0


def _bodies(options: argparse.Namespace) -> Iterator[object]:
    """Yield the requested bodies, with the parameters if given."""
    if options.parameters is None:
        yield from _inputs(options)
        return
    try:
        parameters = json.loads(options.parameters)
    except ValueError as error:
        raise TraceserveError(f"predict: --parameters: {error}") from None
    for inputs in _inputs(options):
        yield {"inputs": inputs, "parameters": parameters}


def _inputs(options: argparse.Namespace) -> Iterator[object]:
    """Yield the inputs in the options; texts of a file are grouped in lists."""
    if sum((bool(options.texts), options.json is not None, options.file is not None)) != 1:
        raise TraceserveError("predict: give texts, or --json BODY, or --file FILE, or - for standard input")
    try:
        if options.json is not None or (options.file and options.file.suffix == ".json"):
            yield json.loads(options.json if options.json is not None else options.file.read_text(encoding="utf-8-sig"))
            return
        if options.file or options.texts == ["-"]:
            content = options.file.read_text(encoding="utf-8") if options.file else sys.stdin.read()
            content = content.lstrip("\ufeff")  # a byte order mark is no part of the first text
            # not splitlines: a text may contain U+2028
            texts = [line.rstrip("\r") for line in content.split("\n") if line.strip()]
            yield from (texts[i : i + 32] for i in range(0, len(texts), 32))
        elif len(options.texts) == 1:
            yield options.texts[0]
        else:
            yield options.texts
    except (OSError, ValueError) as error:
        raise TraceserveError(
            f"predict: {'--json' if options.json is not None else options.file or 'standard input'}: {error}"
        ) from None


COMMANDS = (
    Command(
        "predict",
        "Ask a running server.\n\nPrints one answer, as JSON, for each text:\n\n"
        '  traceserve predict NAME "some text" "another"\n  traceserve predict NAME --json \'{"inputs": "some text", '
        '"parameters": {"top_k": 3}}\'\n  cat texts.txt | traceserve predict NAME -',
        _add_predict,
        _predict,
        finds_servers=True,
    ),
)
