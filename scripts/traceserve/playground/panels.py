"""What the page shows of each model's answer: how long it took, what was not read, the answer, how two differ."""

from __future__ import annotations

import json
import re
from typing import Any, List, Mapping, Sequence

from traceserve.playground import asking, shapes
from traceserve.playground.asking import Heard
from traceserve.playground.marks import escaped, unread
from traceserve.playground.models import Model

_ITEM = re.compile(r"(?P<field>\w+)\[(?P<number>\d+)\]")


def panels(models: Sequence[Model], body: Mapping[str, object], said: Sequence[Heard]) -> List[str]:
    """A panel for each model, as HTML."""
    found = []
    for number, (model, heard) in enumerate(zip(models, said)):
        others = [each for i, each in enumerate(said) if i != number]
        compared = others[0].value if others and _whole(heard) and _whole(others[0]) else None
        found.append(_panel(model, body, heard, compared, named=len(models) > 1))
    return found


def verdict(said: Sequence[Heard]) -> str:
    """How two answers differ, as HTML; nothing before both are whole."""
    if len(said) < 2 or not all(map(_whole, said)):
        return ""
    one, two = (heard.value for heard in said)
    same = ' class="ts-verdict ts-same"' if one == two else ' class="ts-verdict"'
    return f'<p role="status"{same}>{escaped(shapes.difference(one, two))}</p>'


def _whole(heard: Heard) -> bool:
    return heard.done and not heard.stopped and heard.error is None


def _panel(model: Model, body: Mapping[str, object], heard: Heard, other: object, named: bool) -> str:
    own = model.description
    title = f"<h3>{escaped(own.name)} <small>{escaped(own.version)}</small></h3>" if named else ""
    parts = [title, f'<p class="ts-facts" role="status">{_status(heard)}</p>']
    if heard.error is not None:
        where = f"<b>{escaped(heard.where)}:</b> " if heard.where else ""
        parts.append(f'<p class="ts-error" role="alert">{where}{escaped(heard.error)}</p>')
    if heard.unseen:
        parts.append(_unread(body, heard))
    if heard.value is not None:
        parts.append(shapes.show(heard.value, shapes.Context(own, body), other))
        if heard.done and not heard.streamed:
            text = escaped(json.dumps(heard.value, indent=1, ensure_ascii=False))
            parts.append(f'<details class="ts-raw"><summary>JSON</summary><pre class="ts-json">{text}</pre></details>')
    return f'<section class="ts-panel" aria-label="answer of {escaped(own.name)}">{"".join(parts)}</section>'


def _status(heard: Heard) -> str:
    if heard.done:
        facts = asking.facts(heard).items()
        return " ".join(f"<span><b>{escaped(name)}</b> {escaped(value)}</span>" for name, value in facts)
    return f"{heard.pieces:,} pieces so far" if heard.streamed else "asked, and waiting for the answer"


def _unread(body: Mapping[str, Any], heard: Heard) -> str:
    """The texts of which a part was not read, with that part marked."""
    parts = []
    for name, span in heard.unseen.items():
        item = _ITEM.fullmatch(name)
        text = body.get(name) if item is None else body.get(item["field"], [])[int(item["number"])]
        if isinstance(text, str):
            parts.append(
                f'<p class="ts-facts">The model did not read {span[1] - span[0]:,} of the {len(text):,} characters of '
                f'{escaped(name)}:</p><p class="ts-text ts-cut-text" tabindex="0">{unread(text, span)}</p>'
            )
        else:
            parts.append(f'<p class="ts-facts">The model did not read all of {escaped(name)}.</p>')
    return "".join(parts)
