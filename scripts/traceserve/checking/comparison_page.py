"""A comparison of two archives as one HTML file: nothing is loaded from elsewhere, and every text is escaped."""

from __future__ import annotations

import json
from html import escape
from typing import Iterable, Mapping, Sequence

from traceserve.building.speeds import AT_ONCE
from traceserve.checking.comparing import AnswerChange, ArchiveComparison, FieldChange
from traceserve.errors import shortened

_EXAMPLES = 200
_LONGEST = 400  # characters of a request or an answer
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --a: #b4530a; --b: #0a6fb4; --good: #19734a; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --a: #f0a35e; --b: #7cc0f5; --good: #6fd3a3; --bad: #ff8a80 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere } th { font-weight: 600 } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap }
code { font-size: .9em } .a { color: var(--a) } .b { color: var(--b) } .quiet { opacity: .7 }
.verdict { font-weight: 600 } .equal { color: var(--good) } .different { color: var(--bad) }
.bar { background: var(--soft); border-radius: 3px } .bar span { display: block; height: .5rem; border-radius: 3px;
  background: currentColor }
"""


def comparison_page(found: ArchiveComparison) -> str:
    """Return the page."""
    verdict = "equal" if found.equal else "different"
    refused = f" ({found.refused:,} refused by both)" if found.refused else ""
    head = (
        f'<h1><span class="a">{escape(found.sides[0].path)}</span> and <span class="b">{escape(found.sides[1].path)}</span></h1>'
        f'<p><span class="verdict {verdict}">{verdict}</span>: {len(found.changed):,} of {found.asked:,} answers changed'
        f"{refused}; {found.drift_in_words}."
        f'<br><span class="quiet">{escape(found.task)}; {"your samples" if found.own else "built-in samples"}; each archive in '
        f"a process of its own, {found.threads} thread(s).</span></p>"
    )
    parts = [
        head,
        _costs(found),
        _changes("Labels", found.labels),
        _changes("Tokenizer", found.tokenizer),
        _moves(found),
        _examples(found.changed),
        _changes("What else the manifests say", found.fields),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>traceserve diff</title><style>{_STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    kind = ' class="n"' if numbers else ""
    head = "".join(f"<th{kind if i else ''}>{text}</th>" for i, text in enumerate(header))
    body = "".join(
        "<tr>" + "".join(f"<td{kind if i else ''}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _costs(found: ArchiveComparison) -> str:
    one, other = found.sides
    rows = []
    for name, values, unit in (
        ("p50 of one request", (one.p50_ms, other.p50_ms), "ms"),
        (f"requests a second, {AT_ONCE} at a time", (one.requests_per_second, other.requests_per_second), ""),
        ("memory of the process", (one.memory_mib, other.memory_mib), "MiB"),
        ("size", (one.size / 1e6, other.size / 1e6), "MB"),
    ):
        largest = max(*values, 1e-12)
        bars = "".join(
            f'<div class="bar {side}"><span style="width:{100 * value / largest:.0f}%"></span></div>'
            for side, value in zip("ab", values)
        )
        rows.append(
            (
                name + bars,
                *(f"{value:,.3g} {unit}".strip() for value in values),
                f"{values[1] / max(values[0], 1e-12):.2f}",
            )
        )
    return "<h2>Cost</h2>" + _table(
        ("", '<span class="a">one</span>', '<span class="b">other</span>', "ratio"), rows, True
    )


def _changes(title: str, changes: Sequence[FieldChange]) -> str:
    if not changes:
        return f'<h2>{title}</h2><p class="quiet">the same</p>'
    rows = [(escape(c.what), f"<code>{escape(c.one)}</code>", f"<code>{escape(c.other)}</code>") for c in changes]
    return f"<h2>{title}</h2>" + _table(("", '<span class="a">one</span>', '<span class="b">other</span>'), rows)


def _moves(found: ArchiveComparison) -> str:
    if not found.moves:
        return ""
    rows = [(escape(one), escape(other), f"{count:,}") for one, other, count in found.moves]
    return "<h2>Moved</h2>" + _table(('<span class="a">from</span>', '<span class="b">to</span>', "answers"), rows)


def _examples(changed: Sequence[AnswerChange]) -> str:
    if not changed:
        return ""
    rows = [
        (
            f"{c.number}",
            _texts(c.inputs),
            f"<code>{escape(_short(c.one))}</code>",
            f"<code>{escape(_short(c.other))}</code>",
        )
        for c in changed[:_EXAMPLES]
    ]
    more = f'<p class="quiet">and {len(changed) - _EXAMPLES:,} more</p>' if len(changed) > _EXAMPLES else ""
    header = ("#", "request", '<span class="a">one</span>', '<span class="b">other</span>')
    return "<h2>Changed answers</h2>" + _table(header, rows) + more


def _texts(inputs: Mapping[str, object]) -> str:
    return "<br>".join(f'<span class="quiet">{escape(str(k))}</span> {escape(_short(v))}' for k, v in inputs.items())


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shortened(text, _LONGEST)
