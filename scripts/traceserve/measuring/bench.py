"""Measures a server, or two alternately; the result is one JSON document."""

from __future__ import annotations

import datetime
import platform
import statistics
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from traceserve_runtime import processor

from traceserve import __version__
from traceserve.errors import ServerError
from traceserve.measuring import load_generator, server_times
from traceserve.measuring.answers import Consistency
from traceserve.measuring.documents import BenchDocument, Figures, Machine, Peak, Ratio, Summary
from traceserve.measuring.page import load_name
from traceserve.measuring.targets import BenchTarget, check_answer, with_distinct_labels

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
_CURVE = tuple(
    round(100 * (1 - 10 ** (-step / 20)), 6) for step in range(81)
)  # 0 to 99.99, with an even resolution in the tail


@dataclass(frozen=True)
class BenchPlan:
    """The measurements of each subject: at each number of connections, or at one rate, in each round."""

    connections: Tuple[int, ...] = (16,)
    rate: Optional[float] = None
    seconds: float = 10.0
    warm_up: float = 2.0
    rounds: int = 1
    seed: int = 0
    retries: int = 0  # for each failed request, as clients do
    check: bool = False  # compare the answers to each request


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    subjects: Sequence[BenchTarget],
    plan: BenchPlan,
    samples: str,
    progress: Callable[[str, float], None],
    peak_of: Optional[Callable[[str, str], Optional[float]]] = None,
) -> BenchDocument:
    """Return the document: each measurement, and the medians of its rounds for each subject and load.

    Subjects alternate in each round, in reverse every other round, so that drift affects all alike. `peak_of` measures this
    machine's peak in a dtype, on a kind of hardware (`peak.measure_peak`, which needs torch).
    """
    subjects = with_distinct_labels(subjects)
    for asked in subjects:
        check_answer(asked)
    measured: List[Tuple[BenchTarget, int, load_generator.Result, Optional[server_times.ServerTimes]]] = []
    for turn in range(plan.rounds):
        for connections in plan.connections:
            for asked in subjects if turn % 2 == 0 else reversed(subjects):
                named = load_name({"connections": connections, "rate": plan.rate})
                what = f"{asked.label}, {named}, round {turn + 1} of {plan.rounds}"

                def tell(share: float, what: str = what) -> None:
                    progress(what, share)

                result, times = _once(asked, connections, plan, plan.seed + turn, tell)
                measured.append((asked, connections, result, times))
    summaries = [
        _summary(asked, connections, [(r, t) for a, c, r, t in measured if a is asked and c == connections])
        for connections in plan.connections
        for asked in subjects
    ]
    return {
        "traceserve": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "samples": {"file": samples, "bodies": len(subjects[0].traffic.bodies)},
        "plan": {
            "loop": "closed" if plan.rate is None else "open",
            "connections": list(plan.connections),
            "rate": plan.rate,
            "seconds": plan.seconds,
            "warm_up": plan.warm_up,
            "rounds": plan.rounds,
            "seed": plan.seed,
            "retries": plan.retries,
            "check": plan.check,
        },
        "subjects": [asked.label for asked in subjects],
        "peaks": _peaks(subjects, peak_of, progress) if peak_of else {},
        "summary": summaries,
        "ratios": _ratios(summaries) if len(subjects) > 1 else [],
        "measurements": [{"subject": a.label, **_figures(a, c, r, t)} for a, c, r, t in measured],
    }


def _once(
    asked: BenchTarget, connections: int, plan: BenchPlan, seed: int, progress: Callable[[float], None]
) -> Tuple[load_generator.Result, Optional[server_times.ServerTimes]]:
    def run() -> load_generator.Result:
        content = asked.traffic
        return load_generator.send_load(
            asked.target,
            content.bodies,
            content.content_type,
            connections,
            rate=plan.rate,
            seconds=plan.seconds,
            warm_up=plan.warm_up,
            seed=seed,
            progress=progress,
            retries=plan.retries,
            check=Consistency() if plan.check else None,
        )

    if asked.metrics is None:
        result, times = run(), None
    else:
        with server_times.Watch(asked.metrics, asked.name, plan.warm_up, plan.seconds) as watch:
            result = run()
        times = watch.times
    if not result.requests:
        reasons = ", ".join(f"{count} times {reason}" for reason, count in result.errors.items())
        raise ServerError(
            f"{asked.label} answered no request in {plan.seconds:g} s: "
            + (reasons or "none began in this time, since earlier ones took longer; allow more with --seconds")
        )
    return result, times


def _peaks(
    subjects: Sequence[BenchTarget],
    peak_of: Callable[[str, str], Optional[float]],
    progress: Callable[[str, float], None],
) -> Dict[str, Peak]:
    """Measure what this machine can compute in the dtype of each archive that tells its model's arithmetic, once for each
    dtype; no load is sent meanwhile."""
    told = {asked.label: asked.arithmetic for asked in subjects if asked.arithmetic is not None}
    kinds = dict.fromkeys((arithmetic.dtype, arithmetic.hardware) for arithmetic in told.values())
    measured = {}
    for number, kind in enumerate(kinds):
        progress("products of matrices", number / len(kinds))
        measured[kind] = peak_of(*kind)
    peaks = {label: (each.dtype, measured[each.dtype, each.hardware]) for label, each in told.items()}
    return {
        label: {"dtype": dtype, "operations_per_second": round(peak)}
        for label, (dtype, peak) in peaks.items()
        if peak is not None
    }


def machine() -> Machine:
    """Return the machine facts that figures depend on."""
    return {
        "processor": processor.name(),
        "cores": processor.cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


# --- the document -----------------------------------------------------------------------------------------------------


def percentile_name(p: float) -> str:
    return "max" if p == 100 else f"p{p:g}"


def _figures(
    asked: BenchTarget, connections: int, result: load_generator.Result, times: Optional[server_times.ServerTimes]
) -> Figures:
    """Return one measurement; times in milliseconds."""
    mean = float(result.latencies.mean())
    return {
        "connections": connections,
        "most_connections": result.connections,
        "rate": result.rate,
        "seconds": round(result.seconds, 3),
        "requests": result.requests,
        "throughput": round(result.throughput, 2),
        "latency_ms": {
            "mean": _ms(mean),
            **{percentile_name(p): _ms(result.percentile(p)) for p in PERCENTILES},
        },
        "curve_ms": [[p, _ms(result.percentile(p))] for p in _CURVE if (100 - p) / 100 * result.requests >= 1],
        "errors": result.errors,
        "retried": result.retried,
        "generator_cpu": round(result.cpu, 3),
        "server": None
        if times is None
        else {
            "requests": times.requests,
            "time_ms": None
            if asked.continuous
            else {part: _ms(seconds) for part, seconds in times.shares(mean).items()},
            "tokens": round(times.tokens, 1),
            "padding_share": round(times.padding_share, 3),
            "operations": None if asked.arithmetic is None else asked.arithmetic.of_a_request(times.tokens, times.rows),
        },
    }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)


def _summary(
    asked: BenchTarget,
    connections: int,
    rounds: Sequence[Tuple[load_generator.Result, Optional[server_times.ServerTimes]]],
) -> Summary:
    """Return the medians of the rounds, figure by figure; errors and retried requests are summed."""
    figures = [_figures(asked, connections, result, times) for result, times in rounds]
    errors: Dict[str, int] = {}
    for one in figures:
        for reason, count in one["errors"].items():
            errors[reason] = errors.get(reason, 0) + count
    throughputs = [one["throughput"] for one in figures]
    medians: Figures = _median(figures)
    return {
        **medians,
        "subject": asked.label,
        "connections": connections,
        "throughput_range": [min(throughputs), max(throughputs)],
        "errors": errors,
        "retried": sum(one["retried"] for one in figures),
    }


def _median(values: Sequence[Any]) -> Any:  # numbers, or documents of any shape
    """Return, for documents of one shape, a document with the medians of their numbers."""
    first = values[0]
    if any(value is None for value in values):
        present = [value for value in values if value is not None]
        return _median(present) if present else None
    if isinstance(first, dict):
        keys = [key for key in first if all(key in value for value in values)]
        return {key: _median([value[key] for value in values]) for key in keys}
    if isinstance(first, list):
        return [_median(column) for column in zip(*values)]
    return round(statistics.median(values), 4)


def _ratios(summaries: Sequence[Summary]) -> List[Ratio]:
    """Return the first subject's medians divided by the second's, for each load."""
    ratios: List[Ratio] = []
    for one, other in zip(summaries[::2], summaries[1::2]):
        latencies = {name: round(value / other["latency_ms"][name], 3) for name, value in one["latency_ms"].items()}
        throughput = round(one["throughput"] / other["throughput"], 3)
        ratios.append(
            {"connections": one["connections"], "rate": one["rate"], "throughput": throughput, "latency": latencies}
        )
    return ratios
