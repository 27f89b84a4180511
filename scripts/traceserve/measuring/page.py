"""The page of a measurement: one HTML file that works offline, made from the document of `bench.measure`."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Dict, Iterable, List, Optional, Sequence

from traceserve.errors import ServerError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure  # type: ignore[import-untyped]

    from traceserve.measuring.documents import BenchDocument, Load, Peak, Summary

_DOCUMENT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title><style>
body {font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222}
table {border-collapse: collapse} th, td {padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd}
th:first-child, td:first-child {text-align: left} .note {color: #666}
</style></head><body>
<h1>TITLE</h1>
BODY
</body></html>
"""
COLORS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#e377c2", "#7f7f7f")
_DASHES = ("solid", "dash")  # by subject
_TAIL = (0, 50, 90, 99, 99.9, 99.99)


def require_plotly() -> None:
    """Raise ServerError unless the plotting library is installed."""
    try:
        import plotly  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        raise ServerError("--html needs the package plotly; install it with: pip install 'traceserve[bench]'") from None


def page(document: BenchDocument) -> str:
    """Return the whole file, including plotly's JavaScript (5 MB)."""
    figures = [_latencies(document)]
    if document["plan"]["rate"] is None:
        figures.append(_over_connections(document))
    if any(time_parts(summary) for summary in document["summary"]):
        figures.append(_where_time_goes(document))
    title = "traceserve bench: " + html.escape(" and ".join(document["subjects"]))
    return html_document(title, [_about(document), _table(document)], figures)


def html_document(title: str, parts: List[str], figures: Sequence[Figure]) -> str:
    """Return a file with these parts and then the figures; all of it is HTML."""
    body = list(parts)
    for number, figure in enumerate(figures):
        figure.update_layout(template="plotly_white", height=520, margin={"t": 60})
        options = {"full_html": False, "include_plotlyjs": number == 0, "config": {"displaylogo": False}}
        body.append(str(figure.to_html(**options)))
    return _DOCUMENT.replace("TITLE", title).replace("BODY", "\n".join(body))


def load_name(figures: Load) -> str:
    """Describe a measurement's load."""
    if figures["rate"] is not None:
        return f"{figures['rate']:g} requests/s"
    return f"{figures['connections']} connection{'' if figures['connections'] == 1 else 's'}"


def peak_share(summary: Summary, peak: Optional[Peak]) -> str:
    """Return the share of the machine's peak that the served products take, in percent; empty if unknown."""
    operations = summary["server"] and summary["server"]["operations"]
    if peak is None or not operations:
        return ""
    return f"{100 * summary['throughput'] * operations / peak['operations_per_second']:.0f} %"


def time_parts(summary: Summary) -> Dict[str, float]:
    """Return the parts of a request's mean time, in milliseconds; empty if unknown."""
    return (summary["server"] and summary["server"]["time_ms"]) or {}


def _about(document: BenchDocument) -> str:
    plan, machine, samples = document["plan"], document["machine"], document["samples"]
    rounds = f", medians of {plan['rounds']} rounds in turn" if plan["rounds"] > 1 else ""
    due = "" if plan["rate"] is None else "; a latency counts from when its request was due"
    peaks = {peak["dtype"]: peak["operations_per_second"] / 1e9 for peak in document["peaks"].values()}
    lines = (
        f"{document['date']}, traceserve {document['traceserve']}",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, which sent the load",
        f"{plan['loop']} loop, {plan['seconds']:g} s after {plan['warm_up']:g} s of warm-up{rounds}{due}",
        f"{samples['bodies']:,} bodies from {samples['file']}",
        *(f"peak: products of matrices in {dtype} reach {peak:,.0f} GFLOP/s there" for dtype, peak in peaks.items()),
    )
    return '<p class="note">' + "<br>".join(html.escape(line) for line in lines) + "</p>"


def _table(document: BenchDocument) -> str:
    names = list(document["summary"][0]["latency_ms"])
    peaks = document["peaks"]
    header = [
        "",
        "load",
        "requests/s",
        *(f"{name} ms" for name in names),
        "errors",
        *(["share of the peak"] if peaks else ()),
    ]
    rows = [
        [
            summary["subject"],
            load_name(summary),
            f"{summary['throughput']:,.1f}",
            *(f"{summary['latency_ms'][name]:,.2f}" for name in names),
            ", ".join(f"{count} × {reason}" for reason, count in summary["errors"].items()) or "0",
            *([peak_share(summary, peaks.get(summary["subject"]))] if peaks else ()),
        ]
        for summary in document["summary"]
    ]
    return html_table(header, rows)


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{cells}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _style(document: BenchDocument, summary: Summary) -> Dict[str, str]:
    """Return a line style: colours mark loads, dashes mark subjects."""
    loads: List[int] = document["plan"]["connections"]
    color = COLORS[loads.index(summary["connections"]) % len(COLORS)]
    return {"color": color, "dash": _DASHES[document["subjects"].index(summary["subject"]) % len(_DASHES)]}


def _latencies(document: BenchDocument) -> Figure:
    """Plot latency by percentile, with a logarithmic axis of the share above, so that the tail is readable."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for summary in document["summary"]:
        curve = [(percent, latency) for percent, latency in summary["curve_ms"] if percent < 100]
        figure.add_scatter(
            x=[1 / (1 - percent / 100) for percent, _ in curve],
            y=[latency for _, latency in curve],
            customdata=[percent for percent, _ in curve],
            name=html.escape(f"{summary['subject']}, {load_name(summary)}"),
            line=_style(document, summary),
            hovertemplate="p%{customdata:.4g}: %{y:.3g} ms",
        )
    ticks = {"tickvals": [1 / (1 - p / 100) for p in _TAIL], "ticktext": [f"{p:g} %" for p in _TAIL]}
    figure.update_xaxes(type="log", title="percentile", **ticks)
    figure.update_yaxes(type="log", title="latency, ms", dtick="D1")
    figure.update_layout(title="Latency distribution", showlegend=True)
    return figure


def _over_connections(document: BenchDocument) -> Figure:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots  # type: ignore[import-untyped]

    figure = make_subplots(rows=1, cols=2, subplot_titles=("Throughput", "Latency: p50 (full), p99 (dashed)"))
    for number, subject in enumerate(document["subjects"]):
        own = sorted((s for s in document["summary"] if s["subject"] == subject), key=lambda s: int(s["connections"]))
        connections = [summary["connections"] for summary in own]
        throughput = [summary["throughput"] for summary in own]
        lowest, highest = zip(*(summary["throughput_range"] for summary in own))
        color = COLORS[number % len(COLORS)]
        spread = {
            "type": "data",
            "symmetric": False,
            "array": [high - middle for high, middle in zip(highest, throughput)],
            "arrayminus": [middle - low for low, middle in zip(lowest, throughput)],
        }
        common = {"x": connections, "mode": "lines+markers", "legendgroup": subject}
        name = html.escape(subject)
        figure.add_trace(go.Scatter(y=throughput, error_y=spread, name=name, line={"color": color}, **common), 1, 1)
        for percentile, dash in (("p50", "solid"), ("p99", "dash")):
            latencies = [summary["latency_ms"][percentile] for summary in own]
            line = {"color": color, "dash": dash}
            label = f"{name} {percentile}"
            figure.add_trace(go.Scatter(y=latencies, name=label, line=line, showlegend=False, **common), 1, 2)
    known = document["plan"]["connections"]
    figure.update_xaxes(type="log", title="connections", tickvals=known, ticktext=[str(number) for number in known])
    figure.update_yaxes(title="requests/s", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(type="log", title="latency, ms", dtick="D1", row=1, col=2)
    return figure


def _where_time_goes(document: BenchDocument) -> Figure:
    import plotly.graph_objects as go

    shown = [(summary, time_parts(summary)) for summary in document["summary"] if time_parts(summary)]
    labels = [html.escape(f"{summary['subject']}, {load_name(summary)}") for summary, _ in shown]
    figure = go.Figure()
    parts = dict.fromkeys(part for _, time_ms in shown for part in time_ms)  # another engine's are others
    for part, color in zip(parts, COLORS):
        times = [time_ms.get(part, 0.0) for _, time_ms in shown]
        figure.add_bar(y=labels, x=times, name=part, orientation="h", marker_color=color)
    figure.update_xaxes(title="ms of a request, mean")
    figure.update_layout(title="Where the time of a request goes", barmode="stack", showlegend=True)
    return figure
