"""explain: how much each word of a text added to an answer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Sequence

from traceserve_runtime.errors import TraceserveError

from traceserve.commands.arguments import add_port
from traceserve.commands.contract import Command
from traceserve.commands.printing import console, figure

if TYPE_CHECKING:
    from rich.text import Text

_FOR, _AGAINST = (46, 160, 67), (218, 54, 51)  # green and red
_ROWS = 10  # words in the table, the strongest
_BAR = 20  # characters


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "place", metavar="NAME|ARCHIVE", help="a served archive's name, or a .mar, which is loaded here"
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts whose answers are explained")
    parser.add_argument("--body", metavar="JSON", help="a request body as JSON, instead of texts")
    parser.add_argument(
        "--parameters",
        metavar="JSON",
        help='the explanation\'s parameters, such as \'{"label": "refund", "steps": 50}\'',
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one line for each text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the coloured texts")
    add_port(parser)


def _explain(options: argparse.Namespace) -> int:
    body = _body(options)
    archive = Path(options.place)
    if archive.suffix == ".mar":
        from traceserve.checking.explaining import explain_archive

        answer = explain_archive(archive, body)
    else:
        answer = _ask(options, body)
    listed: List[Any] = answer if isinstance(answer, list) else [answer]
    asked = body["inputs"] if isinstance(body, dict) and "inputs" in body else body
    requests = asked if isinstance(asked, list) else [asked]
    if options.html and all(isinstance(each, dict) and "words" in each for each in listed):
        options.html.write_text(_page(requests, listed), encoding="utf-8")
    for request, each in zip(requests, listed):
        if options.json or not (isinstance(each, dict) and "words" in each):  # the form of another protocol
            print(json.dumps(each, ensure_ascii=False), flush=True)
        else:
            _print(request, each)
    return 0


def _body(options: argparse.Namespace) -> object:
    """Return what is asked; raises TraceserveError for options that do not go together, or are no JSON."""
    if bool(options.texts) == (options.body is not None):
        raise TraceserveError("explain: give texts, or --body JSON")
    try:
        inputs = json.loads(options.body) if options.body is not None else options.texts
        parameters = None if options.parameters is None else json.loads(options.parameters)
    except ValueError as error:
        raise TraceserveError(f"explain: --body and --parameters should be JSON: {error}") from None
    if options.body is None and len(inputs) == 1:
        inputs = inputs[0]
    return inputs if parameters is None else {"inputs": inputs, "parameters": parameters}


def _ask(options: argparse.Namespace, body: object) -> object:
    from traceserve.errors import ServerError
    from traceserve.serving import client, instances

    instance = instances.find_instance(options.port)
    if options.place not in instance.names:
        raise ServerError(f"the server on port {instance.port} has no {options.place}, but {', '.join(instance.names)}")
    answer: object = client.predict(
        instance.url, options.place, body, instance.key, certificate=instance.certificate, door="explanations"
    )
    return answer


def _print(request: object, found: Mapping[str, Any]) -> None:
    """Print the text with coloured words, and a table of the strongest ones."""
    from rich.table import Table
    from rich.text import Text

    screen = console()
    for field, text in _fields(request, found).items():
        screen.print(_coloured(text, field, found["words"]), soft_wrap=True)
    words = sorted(found["words"], key=lambda word: -abs(word["attribution"]))
    largest = abs(words[0]["attribution"]) if words else 0.0
    table = Table("word", "attribution", "")
    for word in words[:_ROWS]:
        amount = word["attribution"]
        length = round(_BAR * abs(amount) / largest) if largest else 0
        table.add_row(Text(word["word"]), f"{amount:+.3f}", ("+" if amount > 0 else "-") * length)
    screen.print(table)
    target = ", ".join(f"{key} {value}" for key, value in found["target"].items())
    screen.print(
        f"explains {target}: {found['quantity']} {found['value']:.3f}, without the words {found['baseline_value']:.3f}; "
        f"{found['method'].replace('_', ' ')}, {found['steps']} steps, completeness error "
        f"{100 * found['completeness_error']:.2g} %",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if "because" in found:
        screen.print(f"no gradients: {found['because']}", highlight=False, markup=False, soft_wrap=True)
    if len(words) > _ROWS:
        screen.print(f"the other {figure(len(words) - _ROWS)} words are in --json", highlight=False)


def _fields(request: object, found: Mapping[str, Any]) -> Dict[str, str]:
    """Return the explained texts by field."""
    named = sorted({word["field"] for word in found["words"]})
    if isinstance(request, str):
        return dict.fromkeys(named, request)
    inputs: Any = request
    texts: Dict[str, str] = {}
    for name in named:
        key, _, number = name.partition("[")
        value = inputs.get(key) if isinstance(inputs, dict) else None
        if number and isinstance(value, list):
            value = value[int(number.rstrip("]"))]
        if isinstance(value, str):
            texts[name] = value
    return texts


def _coloured(text: str, field: str, words: Sequence[Mapping[str, Any]]) -> Text:
    from rich.text import Text

    shown = Text(text)
    for start, end, colour, strength in _spans(field, words):
        red, green, blue = (round(strength * part + (1 - strength) * 40) for part in colour)
        shown.stylize(f"white on rgb({red},{green},{blue})", start, end)
    return shown


def _spans(field: str, words: Sequence[Mapping[str, Any]]) -> List[Any]:
    """Return each word's characters, its colour, and how strong it is, 0 to 1."""
    largest = max((abs(word["attribution"]) for word in words), default=0.0) or 1.0
    return [
        (
            word["start"],
            word["end"],
            _FOR if word["attribution"] > 0 else _AGAINST,
            abs(word["attribution"]) / largest,
        )
        for word in words
        if word["field"] == field
    ]


def _page(requests: Sequence[object], listed: Sequence[Mapping[str, Any]]) -> str:
    """Return a page with the coloured texts; it needs nothing else."""
    from html import escape

    parts = []
    for request, found in zip(requests, listed):
        target = ", ".join(f"{key} {value}" for key, value in found["target"].items())
        parts.append(f"<h2>{escape(target)}</h2>")
        for field, text in _fields(request, found).items():
            marked, done = "", 0
            for start, end, colour, strength in sorted(_spans(field, found["words"])):
                shade = f"rgba({colour[0]},{colour[1]},{colour[2]},{strength:.2f})"
                start = max(start, done)  # windows may have a part of the same word
                marked += escape(text[done:start])
                marked += f'<span style="background:{shade}">{escape(text[start:end])}</span>'
                done = max(end, done)
            parts.append(f"<p>{marked}{escape(text[done:])}</p>")
    head = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Explanations</title>'
    style = "<style>body{font:18px/1.8 system-ui;max-width:60rem;margin:2rem auto}span{border-radius:3px}</style>"
    return f"{head}{style}{''.join(parts)}</html>\n"


COMMANDS = (
    Command(
        "explain",
        "Show how much each word of a text added to an answer.\n\nAsks a running server, or loads an archive here:\n\n"
        '  traceserve explain NAME "some text"\n  traceserve explain model_store/NAME.mar "some text" --parameters '
        '\'{"label": "refund"}\'\n  traceserve explain NAME --body \'{"question": "Who?", "context": "She."}\' --json',
        _add_explain,
        _explain,
        finds_servers=True,
    ),
)
