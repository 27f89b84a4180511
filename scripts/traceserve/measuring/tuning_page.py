"""The page of a tuning: one HTML file that works offline."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from traceserve.measuring.page import COLORS, html_document, html_table
from traceserve.measuring.tune import Tuned, describe_serving

if TYPE_CHECKING:
    from plotly.graph_objects import Figure  # type: ignore[import-untyped]

_SIDES = ("computed for padding", "computed for tokens")


def tuning_page(tuned: Tuned, archive: str) -> str:
    """Return the whole file, including plotly's JavaScript (5 MB)."""
    measured = [trial for trial in tuned.trials if not trial.failure]
    rows = [
        (
            describe_serving(trial.serving),
            str(trial.connections),
            f"{trial.throughput:,.1f}",
            *(f"{1000 * trial.percentile(p):,.1f}" for p in (50, 99)),
            "" if trial.relative is None else f"{trial.relative:.2f}",
            "chosen" if trial.serving == tuned.chosen else "as it was" if trial.serving == tuned.own else trial.remark,
        )
        for trial in measured
    ]
    about = (
        f'<p class="note">measured for {tuned.seconds:.0f} s; rate: requests/s compared with the archive as it was, '
        "measured in turn; times in ms</p>"
    )
    header = ("configuration", "connections", "requests/s", "p50", "p99", "rate", "")
    title = f"traceserve tune: {html.escape(archive)}"
    return html_document(title, [about, html_table(header, rows)], [_candidates(tuned), _padding(tuned)])


def _candidates(tuned: Tuned) -> Figure:
    """Plot each candidate's rate and p99: better ones are above, and more to the left."""
    import plotly.graph_objects as go  # type: ignore[import-untyped]

    figure = go.Figure()
    compared = [trial for trial in tuned.trials if trial.relative is not None]
    kinds = {
        "measured": [trial for trial in compared if trial.serving not in (tuned.chosen, tuned.own)],
        "as it was": [trial for trial in compared if trial.serving == tuned.own != tuned.chosen],
        "chosen": [trial for trial in compared if trial.serving == tuned.chosen],
    }
    for (name, trials), color in zip(kinds.items(), (COLORS[7], COLORS[0], COLORS[1])):
        if not trials:  # the archive as it was may be the chosen one
            continue
        figure.add_scatter(
            x=[1000 * trial.percentile(99) for trial in trials],
            y=[trial.relative for trial in trials],
            customdata=[describe_serving(trial.serving) for trial in trials],
            name=name,
            mode="markers",
            marker={"color": color, "size": 8 if name == "measured" else 14},
            hovertemplate="%{customdata}<br>rate %{y:.2f}, p99 %{x:.3g} ms",
        )
    figure.add_hline(y=1.0, line={"color": "#ccc", "dash": "dot"})
    figure.update_xaxes(title="p99, ms")
    figure.update_yaxes(title="requests/s, compared with the archive as it was", rangemode="tozero")
    figure.update_layout(title="Configurations: above and to the left is better", showlegend=True)
    return figure


def _padding(tuned: Tuned) -> Figure:
    """Plot what padding costs on these texts."""
    import plotly.graph_objects as go

    names = [waste.name for waste in tuned.wastes]
    least = tuned.wastes[-1].total
    padding = [waste.total / least * waste.cost for waste in tuned.wastes]
    tokens = [waste.total / least * (1 - waste.cost) for waste in tuned.wastes]
    figure = go.Figure()
    for name, values, color in zip(_SIDES, (padding, tokens), (COLORS[1], COLORS[0])):
        figure.add_bar(y=names, x=values, name=name, orientation="h", marker_color=color)
    figure.update_xaxes(title="cost, in multiples of the least")
    figure.update_layout(
        title="What padding costs on these texts, by the lengths that rows are padded to", barmode="stack"
    )
    return figure
