"""explain: how much each word of a text added to an answer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, List, Mapping, Sequence, Tuple

from traceserve_runtime.errors import TraceserveError

from traceserve.commands.arguments import add_port, add_request, given_inputs, require_writable, with_parameters
from traceserve.commands.contract import Command
from traceserve.commands.printing import console, figure, print_line, printable, printable_json
from traceserve.serving.attributions import Heat, heats, is_explanation, strongest, target_in_words, text_at

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
    add_request(parser, 'the explanation\'s parameters, such as \'{"label": "refund", "steps": 50}\'')
    parser.add_argument("--json", action="store_true", help="print JSON, one line for each text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the coloured texts")
    add_port(parser, text="[of the only server of NAME]")


def _explain(options: argparse.Namespace) -> int:
    if bool(options.texts) == (options.body is not None):
        raise TraceserveError("explain: give texts, or --body JSON")
    require_writable(options.html)
    body = with_parameters(options, given_inputs(options))
    archive = Path(options.place)
    if archive.suffix == ".mar":
        from traceserve.checking.explaining import explain_archive

        answer = explain_archive(archive, body)
    else:
        answer = _ask(options, body)
    listed: List[Any] = answer if isinstance(answer, list) else [answer]
    asked = body["inputs"] if isinstance(body, dict) and "inputs" in body else body
    requests = asked if isinstance(asked, list) else [asked]
    if options.html and not all(map(is_explanation, listed)):
        raise TraceserveError(
            "explain: --html shows explanations of our own protocol, and this body is answered in another one; "
            "without --html the answer is printed as JSON"
        )
    try:  # the page first: whoever reads what is printed may stop reading
        if options.html:
            from traceserve.archives import staging

            staging.write_whole(options.html, _page(requests, listed))
    finally:
        _print_explanations(requests, listed, options.json)
    return 0


def _print_explanations(requests: Sequence[object], listed: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    for request, each in zip(requests, listed):
        if as_json or not is_explanation(each):  # the form of another protocol
            print(printable_json(each), flush=True)
        else:
            _print(request, each)


def _ask(options: argparse.Namespace, body: object) -> object:
    from traceserve.serving import client, instances

    instance = instances.serving_instance(options.place, options.port)
    answer: object = client.predict(instance.address, options.place, body, method="explanations")
    return answer


def _print(request: object, found: Mapping[str, Any]) -> None:
    """Print the text with coloured words, and a table of the strongest ones."""
    from rich.table import Table
    from rich.text import Text

    screen = console()
    for text, own in _texts(request, found):
        screen.print(_coloured(text, own), soft_wrap=True)
    words = strongest(found["words"])
    largest = abs(words[0]["attribution"]) if words else 0.0
    table = Table("word", "attribution", "")
    for word in words[:_ROWS]:
        amount = word["attribution"]
        length = round(_BAR * abs(amount) / largest) if largest else 0
        table.add_row(Text(printable(word["word"])), f"{amount:+.3f}", ("+" if amount > 0 else "-") * length)
    screen.print(table)
    target = target_in_words(found)
    print_line(
        f"explains {target}: {found['quantity']} {found['value']:.3f}, without the words {found['baseline_value']:.3f}; "
        f"{found['method'].replace('_', ' ')}, {found['steps']} steps, completeness error "
        f"{100 * found['completeness_error']:.2g} %"
    )
    if "because" in found:
        print_line(f"no gradients: {found['because']}")
    if len(words) > _ROWS:
        print_line(f"the other {figure(len(words) - _ROWS)} words are in --json")


def _texts(request: object, found: Mapping[str, Any]) -> Iterator[Tuple[str, List[Heat]]]:
    """Yield the explained texts, and what their words added."""
    for field, own in sorted(heats(found["words"]).items()):
        text = text_at(request, field)
        if text is not None:
            yield text, own


def _coloured(text: str, own: Sequence[Heat]) -> Text:
    from rich.text import Text

    shown = Text(printable(text))
    for heat in own:
        strength = abs(heat.share)
        red, green, blue = (round(strength * part + (1 - strength) * 40) for part in _colour(heat))
        shown.stylize(f"white on rgb({red},{green},{blue})", heat.start, heat.end)
    return shown


def _colour(heat: Heat) -> Tuple[int, int, int]:
    return _FOR if heat.share > 0 else _AGAINST


def _page(requests: Sequence[object], listed: Sequence[Mapping[str, Any]]) -> str:
    """Return a page with the coloured texts; it needs nothing else."""
    from html import escape

    parts = []
    for request, found in zip(requests, listed):
        parts.append(f"<h2>{escape(target_in_words(found))}</h2>")
        for text, own in _texts(request, found):
            marked, done = "", 0
            for heat in own:
                red, green, blue = _colour(heat)
                shade = f"rgba({red},{green},{blue},{abs(heat.share):.2f})"
                start = max(heat.start, done)  # windows may have a part of the same word
                marked += escape(text[done:start])
                marked += f'<span style="background:{shade}">{escape(text[start : heat.end])}</span>'
                done = max(heat.end, done)
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
